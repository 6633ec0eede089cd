"""Whole studies of real trials: stopped, resumed and uninterrupted ones end with the same tables."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rsengine.processor import usable_cpus
from rsengine.run.log import RunLog
from tests.study.studies import TINY

TABLES = ("results.csv", "results.json", "results.md", "curves.png", "intervals.png")


def started(folder, out, *options):
    # One thread throughout: sums of other numbers of threads are rounded otherwise.
    return subprocess.Popen(
        [sys.executable, "-m", "rsengine.study", "tiny.toml", "--device", "cpu", "--out", out, *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of studies with an uninterrupted one on as many workers as there are cores, up to two."""
    folder = tmp_path_factory.mktemp("studies")
    (folder / "tiny.toml").write_text(TINY)
    status, output, errors = ended(started(folder, "whole", "--workers", str(min(2, len(usable_cpus())))))
    assert status == 1, errors  # one variant diverges
    assert "wild-seed-0 diverged: the loss is no longer a finite number" in output
    assert "study: 2 of 3 trials are done. Results: whole/results.html" in output
    return folder


def test_a_stopped_and_resumed_study_ends_with_the_same_tables_bit_for_bit(whole):
    process = started(whole, "parts")
    log = RunLog(whole / "parts" / "trials" / "smooth-seed-0")
    while not log.records("interval"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    status, output, errors = ended(process)
    assert status == 130, errors
    assert "study: smooth-seed-0 is stopped, and saved" in output and "the same command goes on with it" in output
    assert not (whole / "parts" / "trials" / "wild-seed-0.log").exists()
    assert "1 of 3 trials are done" in (whole / "parts" / "results.md").read_text()

    status, output, errors = ended(started(whole, "parts"))
    assert status == 1, errors
    assert "study: resuming smooth-seed-0" in output and "training plain-seed-0" not in output
    assert len(log.records("start")) == 2
    for name in TABLES:
        assert (whole / "whole" / name).read_bytes() == (whole / "parts" / name).read_bytes(), name


def test_a_study_that_is_done_trains_nothing_and_other_settings_are_refused(whole):
    before = (whole / "whole" / "results.csv").read_bytes()
    status, output, errors = ended(started(whole, "whole"))
    assert status == 1 and "3 of 3 trials have ended before" in output and "training" not in output, errors
    assert (whole / "whole" / "results.csv").read_bytes() == before
    status, _, errors = ended(started(whole, "whole", "--set", "train.batch_size=16"))
    assert status == 2 and errors.startswith("error: whole: its trials are of another recipe (variant plain, train.")


def test_trials_of_one_seed_see_the_same_images_in_the_same_order(whole):
    """Before the first update two variants that differ in the label smoothing alone get the same number right."""
    first = [
        RunLog(whole / "whole" / "trials" / f"{name}-seed-0").records("interval")[0]
        for name in ("plain", "smooth", "wild")
    ]
    assert len({record["train_accuracy"] for record in first}) == 1
    assert first[0]["train_loss"] == first[2]["train_loss"] != first[1]["train_loss"]
