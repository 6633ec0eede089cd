"""The page of a run: what it says, what it survives, and how Chromium shows it."""

import html
import json
import math
import re

import numpy as np
import pytest
from scipy.stats import binomtest

from rsengine.config import Recipe
from rsengine.run import page as pages
from rsengine.run.log import RunLog
from rsengine.run.page import Chart, Line, Markup, Section, document, markup, table, tag
from rsengine.run.page_classes import calibration, class_table, confusion_matrix, mistakes, wilson
from rsengine.run.page_run import write_page
from tests.browser import Browser, needs_chromium
from tests.run.pages import CLASSES, HOSTILE, arguments, evaluation, records, write_log

SECTIONS = ["run", "curves", "confusion", "classes", "mistakes", "calibration", "augmentation", "time", "recipe"]
SECTIONS += ["machine", "again"]


def written(folder, found=None, **other):
    write_log(folder, records() if found is None else found)
    write_page(folder, **arguments(**other))
    return (folder / "report.html").read_text("utf-8")


def sections(text):
    return re.findall(r'<section id="(\w+)">', text)


def plain(text):
    """The words of a page."""
    return html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(style|script).*?</\1>", " ", text)))


# --- elements -------------------------------------------------------------------------------------------------------


def test_whatever_is_not_markup_is_escaped():
    assert tag("p", "<b>", Markup("<i>x</i>"), title='a"b') == '<p title="a&quot;b">&lt;b&gt;<i>x</i></p>'
    assert markup("a\x1b\u2028\udcff b\n c") == "a\\x1b\\u2028\\udcff b c".replace("\\u2028", " ")
    assert tag("img", src="x", class_=None) == '<img src="x">'


def test_no_name_ends_the_script_that_holds_the_charts():
    line = Line("</script><script>alert(1)</script><!--", "blue", [(0, 1), (1, math.pi)])
    text = document("t", [], [Section("a", "A", [Chart("c", [line])])]).decode()
    data = re.search(r'(?s)<script type="application/json" id="charts">(.*?)</script>', text)[1]
    (chart,) = json.loads(data)
    assert chart["lines"][0]["name"] == line.name and chart["lines"][0]["points"] == [[0, 1], [1, 3.14159]]


def test_long_lines_are_thinned_and_keep_their_ends():
    points = [(i, i) for i in range(5001)]
    kept = pages._thinned(points)
    assert len(kept) <= 602 and kept[0] == (0, 0) and kept[-1] == (5000, 5000)


def test_a_table_sorts_by_keys_and_a_cell_without_one_is_empty():
    text = table(("a", "b"), [("x", "1 %"), ("y", "–")], numbers=[1], keys=[("x", 0.01), ("y", None)])
    assert text.count("<button") == 2 and 'data-value="0.01"' in text and 'data-value=""' in text


# --- a run ----------------------------------------------------------------------------------------------------------


def test_a_whole_run_has_every_section_and_its_numbers(tmp_path):
    text = written(tmp_path)
    words = " ".join(plain(text).split())
    assert sections(text) == SECTIONS
    assert f"80.00 % ± {100 * math.sqrt(0.8 * 0.2 / 300):.2f}" in words
    final = arguments()["result"]["ema"]
    low, high = binomtest(round(final.accuracy * 300), 300).proportion_ci(method="wilson")
    assert f"{100 * low:.2f} % to {100 * high:.2f} % (Wilson)" in words
    found = final.predictions.calibration()
    assert f"(ECE) {100 * found.ece:.2f} %" in words and f"Brier score {found.brier:.4f}" in words
    assert "training steps 3 min 20 s 82.0 %" in words and "waiting for the loader 20.0 s 8.2 %" in words
    assert "evaluation 20.0 s 8.2 %" in words and "checkpoints, without the last 4.0 s 1.6 %" in words
    assert f"3 of {len(Recipe().flat())} settings differ" in words and "augment.flip false true" in words
    assert "Some CPU @ 2 GHz" in words and "python -m rsengine.train --recipe recipe.toml --data SOURCE" in words
    assert text.count('<ul class="mistakes">') == 1 and text.count("<li>") == 25
    assert len(re.findall('src="data:image/png', text)) == 25 + 20
    assert "Unfinished" not in words


def test_nothing_in_it_names_another_file(tmp_path):
    text = written(tmp_path)
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "url(" not in text.replace("url(#${", "")
    assert "@import" not in text and len(text.encode()) < 2_000_000
    assert "default-src 'none'" in text


def test_hostile_names_are_words_only(tmp_path):
    text = written(tmp_path)
    assert "<script>window" not in text and text.count("<script") == 2
    assert plain(text).count("<script>window.hacked=1</script>") > 20


def test_a_run_that_stopped_early_says_so_and_leaves_out_what_it_cannot_know(tmp_path):
    result = {"raw": evaluation(predictions=False)}
    text = written(tmp_path, records(2), result=result, worst=[])
    assert "Unfinished run: 2 of 4 planned epochs" in " ".join(plain(text).split())
    assert sections(text) == [name for name in SECTIONS if name not in ("mistakes", "calibration")]


def test_a_run_stopped_in_its_first_epoch(tmp_path):
    text = written(tmp_path, records(1)[:2], result={}, worst=[])
    assert "Not evaluated yet" in plain(text) and "confusion" not in sections(text) and "curves" in sections(text)


def test_an_empty_log_and_a_log_without_machine(tmp_path):
    (tmp_path / "a").mkdir()
    text = written(tmp_path / "a", [], result={}, worst=[], examples=None)
    assert "curves" not in sections(text) and "lost what it said" in plain(text)
    start = records()[0]
    del start["machine"], start["versions"]
    assert "Processor" in plain(written(tmp_path / "b", [start]))


def test_the_log_of_an_older_version(tmp_path):
    text = written(tmp_path, records(old=True))
    words = " ".join(plain(text).split())
    assert sections(text) == SECTIONS
    assert "training steps and loader 3 min 40 s" in words and "waiting for the loader" not in words
    assert "checkpoint" not in words.split("Where the time went")[2].split("Images per second")[0]
    assert f"80.00 % ± {100 * math.sqrt(0.8 * 0.2 / 300):.2f}" in words  # from the matrix


@pytest.mark.parametrize("value", ["many", None, True, [1]])
def test_optional_fields_of_a_wrong_type_are_left_out(tmp_path, value):
    found = records()
    for record in found:
        record |= {name: value for name in ("loader_seconds", "checkpoint_seconds", "test_images") if name in record}
    assert sections(written(tmp_path, found)) == SECTIONS


def test_a_page_has_at_most_two_megabytes(tmp_path):
    """A thousand classes with long names, large images, and a long log."""
    names = [f"{i} " + "\U0001f600" * 200 for i in range(1000)]
    base = records(1)
    many = [base[0] | {}] + [r | {"epoch": i / 10, "step": i} for i in range(4000) for r in (base[1],)] + base[-2:]
    text = written(tmp_path, many, classes=names, size=256)
    assert len(text.encode()) <= 2_000_000
    assert sections(text) == SECTIONS


def test_what_does_not_fit_is_left_out_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr("rsengine.run.page_run.LIMIT", 100_000)
    text = written(tmp_path)
    assert "mistakes" not in sections(text) and "Left out, because the page would exceed 2 MB" in plain(text)
    assert "calibration" in sections(text)


def test_a_comment_of_several_lines_and_no_label_at_all(tmp_path):
    recipe = 'name = "a"\ncomment = """x\n</script>\ny"""\n[train]\nunknown = [1, 2]\n'
    words = " ".join(plain(written(tmp_path, recipe_toml=recipe)).split())
    assert 'comment "x </script> y"' in words and "train.unknown [1, 2] –" in words


# --- classes ---------------------------------------------------------------------------------------------------------


def test_confusions_hold_counts_and_percent():
    text = "".join(confusion_matrix(np.array([[8, 2], [0, 0]]), ["a", "b"]))
    assert ">8<small>80.0 %</small>" in text and ">2<small>20.0 %</small>" in text
    assert re.search(r'scope="row" title="b">b</th><td style="--share:0.000"></td>', text)


def test_many_classes_make_a_picture_with_their_confusions():
    matrix = np.eye(60, dtype=np.int64) * 10
    matrix[3, 7] = 5
    text = "".join(confusion_matrix(matrix, [f"c{i}" for i in range(60)]))
    assert 'class="heat"' in text and "<td>c3</td><td>c7</td>" in text and "33.33 %" in text


def test_class_table_equals_scikit_learn():
    from sklearn.metrics import precision_recall_fscore_support

    found = evaluation(4, 500, seed=3)
    expected = precision_recall_fscore_support(found.predictions.labels, found.predictions.predicted)
    text = "".join(class_table(found.confusion, list("abcd")))
    rows = re.findall(r"<tr>(<td.*?)</tr>", text)
    for i, row in enumerate(rows):
        cells = re.findall(r'data-value="([^"]*)"', row)
        precision, recall, f1, images = (values[i] for values in expected)
        assert cells[0] == "abcd"[i] and int(cells[1]) == images
        assert [float(cell) for cell in cells[3:6]] == pytest.approx([recall, precision, f1], rel=1e-5)


def test_a_class_without_images_has_no_recall():
    text = "".join(class_table(np.array([[5, 0], [0, 0]]), ["a", "b"]))
    assert 'data-value="">–<' in text


def test_no_mistakes_are_told_from_unknown_ones():
    assert "No test image was misclassified" in "".join(mistakes([], CLASSES))


def test_the_diagram_has_a_bar_for_each_bin_with_images():
    found = evaluation().predictions.calibration()
    assert "".join(calibration(found)).count('class="bar"') == (found.counts > 0).sum()


@pytest.mark.parametrize(("right", "images"), [(0.0, 10), (1.0, 10), (0.7951, 10000), (0.5, 2)])
def test_the_interval_is_wilsons(right, images):
    expected = binomtest(round(right * images), images).proportion_ci(method="wilson")
    assert wilson(right, images) == pytest.approx((expected.low, expected.high), abs=1e-6)


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    found = Browser()
    yield found
    found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    written(folder)
    return folder / "report.html"


OUTSIDE = """[...document.querySelectorAll("main *, h1, nav, .headline")].filter((each) => {
  const box = each.getBoundingClientRect();
  return box.right > innerWidth + 1 && !each.closest(".scroll, pre") && box.width > 0;
}).length"""


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_section_is_shown_without_an_error_or_a_request(browser, report, width, scheme):
    browser.open(report, width=width, scheme=scheme)
    boxes = browser.run(
        "[...document.querySelectorAll('section')].map((s) => { const b = s.getBoundingClientRect();"
        "return [s.id, b.left, b.right, b.height, s.checkVisibility({ visibilityProperty: true })]; })"
    )
    assert [box[0] for box in boxes] == SECTIONS
    assert all(0 <= left < right <= width and height > 60 and seen for _, left, right, height, seen in boxes), boxes
    assert browser.run("document.scrollingElement.scrollWidth") <= width and browser.run(OUTSIDE) == 0
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 26)"}[scheme]
    assert browser.run("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert browser.run("document.querySelectorAll('.chart svg polyline').length") == 4 + 4 + 1 + 1
    assert not browser.run("window.hacked")
    assert browser.errors == [] and browser.requests == [report.as_uri()]


BROKEN = """[...document.querySelectorAll("th, .headline *, h2")].flatMap((each) => {
  const walker = document.createTreeWalker(each, NodeFilter.SHOW_TEXT), found = [];
  for (let node; node = walker.nextNode();) {
    for (const word of node.data.matchAll(/[^\\s\\-–]+/g)) {
      const range = document.createRange();
      range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length);
      if (word[0].length < 20 && range.getBoundingClientRect().height > 1.5 * range.getClientRects()[0]?.height)
        found.push(word[0]);
    }
  }
  return found;
})"""


@needs_chromium
@pytest.mark.parametrize("width", [320, 390])
def test_no_word_of_a_heading_breaks_on_a_phone(browser, report, width):
    browser.open(report, width=width)
    assert browser.run(BROKEN) == []
    assert browser.run("document.scrollingElement.scrollWidth") <= width


@needs_chromium
def test_the_words_can_be_told_from_the_paper(browser, report):
    """WCAG's contrast of 4.5 for text, in both schemes."""
    script = """(() => {
      const luminance = (colour) => { const c = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
      const paper = luminance(getComputedStyle(document.body).backgroundColor);
      return ["body", ".note", "a", ".headline span"].map((name) => {
        const ink = luminance(getComputedStyle(document.querySelector(name)).color);
        return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); }); })()"""
    for scheme in ("light", "dark"):
        browser.open(report, width=1280, scheme=scheme)
        assert min(browser.run(script)) >= 4.5


@needs_chromium
def test_print_is_dark_on_white_and_whole(browser, report):
    browser.open(report, width=1280, scheme="dark", media="print")
    browser.run("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(document.body).color") == "rgb(34, 34, 34)"
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.run("[...document.querySelectorAll('details')].every((each) => each.open)")


@needs_chromium
def test_charts_are_hovered_zoomed_and_lines_hidden(browser, report):
    browser.open(report, width=1280)
    browser.run("document.querySelector('.chart').scrollIntoView()")
    left, top, width, height = browser.run(
        "(() => { const b = document.querySelector('.chart svg').getBoundingClientRect();"
        "return [b.left, b.top, b.width, b.height]; })()"
    )
    y = top + height / 2
    browser.mouse("mouseMoved", left + width - 20, y)
    tip = browser.run("document.querySelector('.tip').innerText")
    assert "test, EMA weights: 80 % at 4" in tip and "test, raw weights: 75 % at 4" in tip
    inside = browser.run(
        "(() => { const a = document.querySelector('.tip').getBoundingClientRect();"
        "const b = document.querySelector('.chart svg').getBoundingClientRect();"
        "return a.left >= b.left && a.right <= b.right && a.top >= b.top && a.bottom <= b.bottom; })()"
    )
    assert inside
    ticks = (
        "[...document.querySelectorAll('.chart')].map((c) => [...c.querySelectorAll('text')].map((t) => t.textContent))"
    )
    before = browser.run(ticks)
    browser.mouse("mousePressed", left + width * 0.7, y, button="left", clickCount=1)
    browser.mouse("mouseMoved", left + width * 0.9, y, button="left")
    browser.mouse("mouseReleased", left + width * 0.9, y, button="left", clickCount=1)
    zoomed = browser.run(ticks)
    assert all(a != b for a, b in zip(before, zoomed, strict=True)), "all charts show the same part"
    browser.run("document.querySelector('.tools button:last-of-type').click()")
    assert browser.run(ticks) == before
    browser.run("document.querySelector('.tools button').click()")
    assert browser.run(ticks) != before
    browser.mouse("mouseReleased", left + width * 0.5, y, button="left", clickCount=2)
    browser.run("document.querySelector('.tools button:last-of-type').click()")
    browser.run("document.querySelector('.legend button').click()")
    assert browser.run("document.querySelector('.chart').querySelectorAll('polyline').length") == 3
    assert browser.errors == []


@needs_chromium
def test_tables_sort_by_number_and_by_name(browser, report):
    browser.open(report, width=1280)
    column = "[...document.querySelectorAll('#classes tbody tr')].map((row) => row.cells[{}].dataset.value)"
    for index in (1, 3):
        click = f"document.querySelectorAll('#classes th button')[{index}].click()"
        browser.run(click)
        falling = [float(value) for value in browser.run(column.format(index))]
        assert falling == sorted(falling, reverse=True) and len(set(falling)) == 3
        browser.run(click)
        assert [float(value) for value in browser.run(column.format(index))] == falling[::-1]
    browser.run("document.querySelectorAll('#classes th button')[0].click()")
    assert browser.run(column.format(0)) == sorted([HOSTILE, "airplane", "bird & co"])
    assert browser.errors == []


@needs_chromium
def test_without_scripts_the_numbers_are_there(browser, report):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(report, width=390)
        assert browser.run("document.querySelector('noscript').checkVisibility()")
        assert browser.run("document.querySelectorAll('.matrix tbody td').length") == 9
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_the_log_is_not_changed(tmp_path):
    written(tmp_path)
    assert RunLog(tmp_path).records() == json.loads(json.dumps(records()))
