"""The tables, pictures and pages of studies whose trials are made up."""

import csv
import html
import json
import re

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image
from scipy import stats

from rsengine.run.formats import NONE
from rsengine.study import manifest as manifest_module
from rsengine.study.__main__ import _line, write_results
from rsengine.study.manifest import read_manifest
from rsengine.study.results import gather
from rsengine.study.tables import tables
from tests.browser import Browser, needs_chromium
from tests.run.pages import HOSTILE, write_log
from tests.study.studies import done, opened

ADDITIVE = """
comment = "What is added."
seeds = 3
add = ["x", "y"]
[variants.x]
model.dropout = 0.5
[variants.y]
train.label_smoothing = 0.0
[reported]
source = "a paper"
difference = {x = 0.3, y = -0.5}
"""
RESULTS = {"base": [0.80, 0.81, 0.79], "x": [0.83, 0.835, 0.82], "y": [0.831, 0.834, 0.821]}


def made(folder, text=ADDITIVE, results=RESULTS, **options):
    manifest = opened(folder, text, **options)
    for trial in manifest.trials(folder):
        if trial.variant in results:
            done(trial, results[trial.variant][trial.seed], ece=0.1 - 0.01 * trial.seed)
    write_results(folder, manifest, gather(manifest, folder))
    return manifest


def table_of(folder, title):
    text = (folder / "results.md").read_text().split(f"## {title}\n")[1]
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|--")]


def test_every_number_of_an_additive_study(tmp_path):
    made(tmp_path)
    rows = {row["variant"]: row for row in csv.DictReader((tmp_path / "results.csv").open())}
    for name, values in RESULTS.items():
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        for key, value in {"n": 3, "mean": np.mean(values), "low": interval.low, "high": interval.high}.items():
            assert float(rows[name][key]) == pytest.approx(value)
        assert float(rows[name]["deviation"]) == pytest.approx(np.std(values, ddof=1))
        assert float(rows[name]["ema_minus_raw"]) == pytest.approx(0.05)
        assert float(rows[name]["ece"]) == pytest.approx(0.09) and float(rows[name]["brier"]) == 0.3
    for name, reference, reported in (("x", "base", 0.3), ("y", "x", -0.5)):
        test = stats.ttest_rel(RESULTS[name], RESULTS[reference], alternative="greater")
        assert rows[name]["reference"] == reference and float(rows[name]["reported_difference"]) == reported
        assert float(rows[name]["p_one_sided"]) == pytest.approx(test.pvalue)
        assert float(rows[name]["difference"]) == pytest.approx(np.mean(RESULTS[name]) - np.mean(RESULTS[reference]))
    assert (rows["x"]["resolved"], rows["x"]["seeds_needed"]) == ("True", "")
    assert rows["y"]["resolved"] == "False" and int(rows["y"]["seeds_needed"]) > 3
    assert rows["base"]["reference"] == rows["base"]["difference"] == ""
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["variants"][1]["difference"]["p"] == float(rows["x"]["p_one_sided"])
    assert [trial["epochs"][-1]["test_accuracy_ema"] for trial in content["variants"][1]["trials"]] == RESULTS["x"]


def test_the_reported_differences_stand_beside_ours(tmp_path):
    made(tmp_path)
    head, x, y = table_of(tmp_path, "Comparisons")
    assert head[-1] == "Reported" and x[-1] == "+0.3" and y[-1] == "-0.5"
    assert x[:4] == ["x", "base", "3", "+2.83"] and x[-2] == "resolved" and y[-2].isdecimal()
    text = (tmp_path / "results.md").read_text()
    assert "What is added." in text and "Reported: a paper." in text and "9 of 9 trials are done" in text
    assert "## EMA against raw weights" in text and "## Calibration" in text and "error" not in text.split("## Cal")[0]
    for name in ("curves.png", "intervals.png"):
        assert name in text and Image.open(tmp_path / name).size[0] == 1260


def test_equal_results_have_no_interval_and_intervals_end_where_accuracies_do(tmp_path, capsys):
    made(tmp_path, results={"base": [0.7, 0.8, 0.9], "x": [0.8, 0.9, 1.0], "y": [1.0, 1.0, 1.0]})
    base, x, y = table_of(tmp_path, "Test accuracy")[1:]
    assert base[-1] == "55.16 to 100.00" and x[-1] == "65.16 to 100.00" and y[-2:] == ["0.00", "no spread"]
    x, y = table_of(tmp_path, "Comparisons")[1:]
    assert x[3:8] == ["+10.00", "no spread", "no spread", NONE, NONE] and y[7].isdecimal()
    lines = [_line(each) for each in gather(read_manifest(tmp_path), tmp_path)]
    assert lines[1].endswith("to 100.00%; +10.00 points against base (no spread between the seeds)")
    assert lines[2].startswith("y: 100.00%, n = 3, no spread between the seeds; +10.00 points")


@pytest.mark.parametrize("reported", [True, False])
def test_the_picture_names_what_it_shows(tmp_path, reported, monkeypatch):
    words = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, text, **_: words.append(text))
    made(tmp_path, ADDITIVE if reported else ADDITIVE.split("[reported]")[0])
    assert any("; diamond: reported" in text for text in words) == reported
    assert any("95 % interval of the mean" in text for text in words)


def test_reported_accuracies_stand_beside_ours(tmp_path):
    text = "seeds = 2\n[variants.a]\n[variants.b]\nema.enabled = false\n"
    text += '[reported]\nsource = "a report"\naccuracy.b = 91.19\n'
    made(tmp_path, text, {"a": [0.8, 0.9], "b": [0.7, 0.8]})
    head, a, b = table_of(tmp_path, "Test accuracy")
    assert head[-1] == "Reported (%)" and a[-1] == "–" and b[-1] == "91.19" and b[1] == "ema.enabled=false"


def test_failed_trials_are_named_and_the_others_count(tmp_path):
    manifest = opened(tmp_path, ADDITIVE)
    for trial in manifest.trials(tmp_path):
        if trial.variant == "base":
            done(trial, 0.8 + 0.01 * trial.seed)
        elif trial.variant == "x" and trial.seed < 2:
            trial.log.write_text(f"line\nerror: {HOSTILE} | the loss is no longer a finite number at step 3\n\n")
            trial.end(1, "", "code")
        elif trial.variant == "x":
            done(trial, 0.9)
    write_results(tmp_path, manifest, gather(manifest, tmp_path))
    _, base, x, y = table_of(tmp_path, "Test accuracy")
    assert base[3:5] == ["3", "81.00"] and x[3:5] == ["1", "90.00"] and y[3:5] == ["0", "–"]
    text = (tmp_path / "results.md").read_text()
    assert "x-seed-0 | diverged | <script>" in text and "4 of 9 trials are done" in text
    page = (tmp_path / "results.html").read_text()
    assert HOSTILE not in page and HOSTILE in html.unescape(page)
    content = json.loads((tmp_path / "results.json").read_text())
    assert [trial["status"] for trial in content["variants"][1]["trials"]] == ["diverged", "diverged", "done"]


def test_what_trials_warned_of_is_told_once_for_each_variant(tmp_path):
    manifest = opened(tmp_path, ADDITIVE)
    for trial in manifest.trials(tmp_path):
        done(trial, 0.8)
        if trial.variant != "base":
            trial.log.write_text(
                f"data: toy\nwarning: {trial.variant} is dead\nrun: x\nwarning: {trial.variant} is dead\n"
            )
    write_results(tmp_path, manifest, gather(manifest, tmp_path))
    assert table_of(tmp_path, "Warnings")[1:] == [["x", "x is dead"], ["y", "y is dead"]]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["variants"][1]["trials"][0]["warnings"] == ["x is dead"]
    assert "y is dead" in (tmp_path / "results.html").read_text()


def test_a_study_without_a_trial_has_its_tables(tmp_path):
    manifest = opened(tmp_path, ADDITIVE)
    write_results(tmp_path, manifest, gather(manifest, tmp_path))
    assert table_of(tmp_path, "Test accuracy")[1][3:] == ["0", "–", "–", "–"] and not (tmp_path / "curves.png").exists()
    assert "<section" in (tmp_path / "results.html").read_text()
    assert [each.title for each in tables(manifest, gather(manifest, tmp_path))] == ["Test accuracy"]


def test_trials_of_two_versions_of_the_code_are_told(tmp_path):
    manifest = opened(tmp_path, ADDITIVE)
    for trial in manifest.trials(tmp_path):
        done(trial, 0.8, source=f"code {trial.seed // 2}")
    write_results(tmp_path, manifest, gather(manifest, tmp_path))
    assert "made with 2 versions of the code: code 0; code 1." in (tmp_path / "results.md").read_text()


def test_tables_do_not_depend_on_times(tmp_path):
    for name, factor in (("a", 1.0), ("b", 3.0)):
        manifest = opened(tmp_path / name, ADDITIVE)
        for trial in manifest.trials(tmp_path / name):
            done(trial, RESULTS[trial.variant][trial.seed])
            log = trial.folder / "metrics.jsonl"
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            log.unlink()
            write_log(
                trial.folder, [line | {k: factor * v for k, v in line.items() if "second" in k} for line in lines]
            )
        write_results(tmp_path / name, manifest, gather(manifest, tmp_path / name))
    for name in ("results.csv", "results.json", "results.md", "curves.png", "intervals.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_manifest_comes_back_as_it_was(tmp_path):
    manifest = made(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert manifest.source == manifest_module.source_version()


@needs_chromium
def test_chromium_shows_every_section(tmp_path):
    made(tmp_path)
    sections = ["results", "comparisons", "curves", "ema-against-raw-weights", "calibration", "time", "recipes"]
    assert re.findall(r'<section id="([\w-]+)">', (tmp_path / "results.html").read_text()) == sections
    browser = Browser()
    try:
        for width in (390, 1280):
            browser.open(str(tmp_path / "results.html"), width=width, scheme="dark")
            assert browser.run("document.scrollingElement.scrollWidth") <= width
            assert browser.run("document.querySelectorAll('.chart svg polyline').length") == 6
            assert browser.run("[...document.images].every((i) => i.naturalWidth > 0)")
            assert browser.errors == [] and len(browser.requests) == 1
    finally:
        browser.close()
