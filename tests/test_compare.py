"""Several runs on one page: which differ in seeds alone, intervals over these, differences, and every refusal."""

import html
import json
import re

import numpy as np
import pytest
from scipy import stats

from rsengine.compare import main
from rsengine.config import Recipe
from rsengine.run.page_compare import differing, grouped, read_runs
from tests.browser import Browser, needs_chromium
from tests.run.pages import HOSTILE, records, write_log

SECTIONS = ["results", "curves", "recipes", "surroundings"]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes the folder of a run with some settings and a result."""
    monkeypatch.chdir(tmp_path)

    def made(name, accuracy, *settings, epochs=4, old=False, **start):
        folder = tmp_path / name
        found = records(epochs, accuracy=accuracy, old=old)
        found[0] |= start
        write_log(folder, found)
        recipe = Recipe(name=name).with_settings(["train.epochs=4", *settings])
        (folder / "recipe.toml").write_text(recipe.to_toml())
        return folder

    return made


@pytest.fixture
def six(make):
    """Two learning rates with three seeds each."""
    results = {0.1: (0.80, 0.81, 0.79), 0.2: (0.84, 0.85, 0.83)}
    return [
        make(f"r{rate}-{seed}", result, f"schedule.learning_rate={rate}", f"train.seed={seed}")
        for rate, found in results.items()
        for seed, result in enumerate(found)
    ]


def words(path="compare.html"):
    with open(path, encoding="utf-8") as file:
        text = file.read()
    found = re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(style|script).*?</\1>", " ", text))
    return text, " ".join(html.unescape(found).split())


def test_runs_that_differ_in_their_seeds_are_one_configuration(six, capsys):
    assert main([str(folder) for folder in six]) == 0
    expected = stats.t.interval(0.95, 2, loc=0.80, scale=stats.sem([0.80, 0.81, 0.79]))
    line = f"A  schedule.learning_rate=0.1: 80.00%, n = 3, 95% interval {expected[0]:.2%} to {expected[1]:.2%}"
    assert capsys.readouterr().out.splitlines()[0] == line
    text, found = words()
    assert re.findall(r'<section id="(\w+)">', text) == SECTIONS
    interval = f"{100 * expected[0]:.2f} % to {100 * expected[1]:.2f} %"
    assert f"A schedule.learning_rate=0.1 3 80.00 % {100 * np.std([0.80, 0.81, 0.79], ddof=1):.2f} {interval}" in found
    assert "Not the same" not in found
    recipes = found.split("Differences of the recipes")[-1].split("Other differences")
    assert "schedule.learning_rate 0.1 0.1 0.1 0.2 0.2 0.2" in recipes[0] and "train.seed 0 1 2 0 1 2" in recipes[0]
    assert "augment" not in recipes[0] and recipes[1].strip() == "None."
    assert text.count("A: r0.1-0") == 5  # a line in each chart


def test_one_seed_has_no_interval_and_a_seed_that_ran_twice_counts_once(make, capsys):
    folders = [make("a", 0.8), make("b", 0.9), make("c", 0.7, "train.label_smoothing=0")]
    assert main([str(folder) for folder in folders]) == 0
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first == "A  train.label_smoothing=0.1: 80.00%, n = 1"
    assert second == "B  train.label_smoothing=0.0: 70.00%, n = 1"


def test_seeds_with_one_result_have_no_interval(make, capsys):
    folders = [make(f"r{seed}", 0.1003, f"train.seed={seed}") for seed in range(2)]
    assert main([str(folder) for folder in folders]) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith(": 10.03%, n = 2, no spread between the seeds")
    assert " 0.00 no spread " in words()[1]


def test_configurations_that_share_what_is_named_first_are_told_apart(make, capsys):
    many = ("model.dropout=0.5", "model.stem_width=16", "optimizer.momentum=0.8", "schedule.learning_rate=0.2")
    late = ("train.batch_size=64", "train.label_smoothing=0")
    folders = [make("a", 0.8), make("b", 0.8, *many), make("c", 0.8, *many, *late), make("d", 0.8, *many, late[1])]
    data = [{"data": {"name": "x", "identity": letter * 64}} for letter in "ef"]
    folders += [make("e", 0.8, *many, **data[0]), make("f", 0.8, *many, **data[1])]
    assert main([str(folder) for folder in folders]) == 0
    lines = [line.partition("  ")[2] for line in capsys.readouterr().out.splitlines()[:6]]
    assert len(set(lines)) == 6
    assert "train.batch_size=64" in lines[2] and "train.label_smoothing=0.0" in lines[3]
    assert "data eeeeeeee…" in lines[4] and "data ffffffff…" in lines[5] and len(lines[5]) < 250


def test_an_unfinished_run_is_named_and_not_in_the_mean(make, capsys):
    folders = [
        make("whole", 0.8),
        make("short", 0.3, "train.seed=1", epochs=2),
        make("none", 0.5, "train.seed=2", epochs=0),
    ]
    assert main([*map(str, folders)]) == 0
    # What stands against comparing them is the same in the terminal and on the page.
    assert capsys.readouterr().out.splitlines() == [
        "A  whole: 80.00%, n = 1",
        "not finished: short (2 of 4 epochs), none (no epoch evaluated); left out of the means and intervals",
        "wrote compare.html",
    ]
    assert "Not finished: short (2 of 4 epochs), none (no epoch evaluated); left out of the means" in words()[1]


def test_other_data_other_weights_and_another_machine_are_told(make, capsys):
    origin = {"path": "w", "sha256": "c" * 64}
    folders = [
        make("a", 0.8),
        make("b", 0.8, data={"identity": "b" * 64, "name": "other"}),
        make("c", 0.8, origin=origin),
    ]
    assert len(grouped(read_runs(folders))) == 3
    assert main([*map(str, folders)]) == 0
    found = words()[1]
    told = f"a, c on toy (identity {8 * 'a'}…); b on other (identity {8 * 'b'}…); the accuracies of these "
    told += "cannot be compared"
    assert capsys.readouterr().out.splitlines()[3] == f"not the same data: {told}"
    assert f"Not the same data: {told}." in found
    assert f'initial weights, sha256 – – "{"c" * 58}' in found


def test_runs_of_an_older_version(make):
    assert main([str(make("a", 0.8, old=True)), str(make("b", 0.9, old=True)), "--out", "page.html"]) == 0
    assert "Perhaps not the same data: a, b, of which data the log does not say enough" in words("page.html")[1]


def test_accuracies_on_one_test_set_compare_whatever_was_trained_on(make, capsys):
    def data(identity, test):
        return {"name": "toy", "identity": 64 * identity, "sha256": {"train": 64 * identity, "test": 64 * test}}

    older = {"name": "toy", "identity": 64 * "c"}
    make("a", 0.8, data=data("b", "t")), make("b", 0.8, data=data("c", "t")), make("older", 0.8, data=older)
    assert main(["a", "b", "older"]) == 0
    assert "same data" not in capsys.readouterr().out
    make("c", 0.8, data=data("b", "u"))
    assert main(["a", "b", "c"]) == 0
    assert "not the same data: a, b on toy (identity bbbbbbbb…); c on toy (" in capsys.readouterr().out


def test_a_setting_that_an_older_version_did_not_have_is_its_default(make):
    folders = [make("a", 0.8), make("b", 0.9, "train.seed=1")]
    path = folders[1] / "recipe.toml"
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("freeze", "body_rate"))]
    assert len(kept) == len(lines) - 2
    path.write_text("".join(kept))
    (group,) = grouped(read_runs(folders))
    assert group.seeds == [0.9, 0.8]


def test_names_that_are_markup_stay_words(make):
    folders = [make("<b>a", 0.8), make("b", 0.8, f"name={json.dumps(HOSTILE)}")]
    assert main([*map(str, folders)]) == 0
    text, found = words()
    assert "<b>a" not in text and "<script>window" not in text
    assert "<b>a" in found and HOSTILE in found


def test_what_is_printed_is_one_line_for_each_configuration(make, capsys):
    make("a", 0.8, 'name="x\\ny\\u001b[2J"'), make("b", 0.8)
    assert main(["a", "b"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == "A  x\\ny\\x1b[2J: 80.00%, n = 1" and len(lines) == 3


def test_folders_of_one_name_are_told_apart_by_their_paths(make, tmp_path):
    folders = [make("x/run", 0.8), make("y/run", 0.9, "train.seed=1")]
    assert [run.label for run in read_runs(folders)] == [*map(str, folders)]


def test_the_keys_that_differ():
    assert differing([{"a": 1, "b": 2}, {"a": 1, "b": 2.0, "c": None}, {"a": True, "b": 2}]) == ["a", "b"]


def refusal(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_refusals_are_one_line(make, tmp_path, capsys):
    good, other = make("good", 0.8), make("other", 0.8)
    assert "only one run is named" in refusal(capsys, good)
    assert "named twice" in refusal(capsys, good, tmp_path / "other" / ".." / "good", other)
    assert "no metrics.jsonl there" in refusal(capsys, good, tmp_path / "nowhere")
    (other / "recipe.toml").write_text("a = = 1")
    assert "recipe.toml: not a recipe" in refusal(capsys, good, other)
    (other / "recipe.toml").write_bytes(b"\xff\xfe\xff")
    assert "recipe.toml: not a recipe" in refusal(capsys, good, other)
    (other / "recipe.toml").unlink()
    assert "no recipe.toml there" in refusal(capsys, good, other)
    damaged = make("damaged", 0.8)
    log = damaged / "metrics.jsonl"
    log.write_text("{\n" + log.read_text())
    assert "metrics.jsonl, line 1" in refusal(capsys, good, damaged)
    assert "cannot be written" in refusal(capsys, good, make("fine", 0.8), "--out", tmp_path / "no" / "x.html")
    assert not (tmp_path / "compare.html").exists()


@needs_chromium
def test_chromium_shows_every_section(six):
    assert main([str(folder) for folder in six]) == 0
    browser = Browser()
    try:
        for width in (390, 1280):
            for scheme in ("light", "dark"):
                browser.open("compare.html", width=width, scheme=scheme)
                boxes = browser.run(
                    "[...document.querySelectorAll('section')].map((s) => [s.id, s.getBoundingClientRect().height])"
                )
                assert [name for name, _ in boxes] == SECTIONS and min(height for _, height in boxes) > 60
                assert browser.run("document.scrollingElement.scrollWidth") <= width
                assert browser.run("document.querySelectorAll('.chart:first-child svg polyline').length") == 6
                assert browser.errors == [] and len(browser.requests) == 1
    finally:
        browser.close()
