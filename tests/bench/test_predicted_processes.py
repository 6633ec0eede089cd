"""What several GPUs may gain, by arithmetic."""

import pytest

from bench.predicted_processes import (
    DOCUMENT,
    HEADING,
    MEASURED,
    Cluster,
    Step,
    efficiency,
    exchanged,
    half_from,
    measured_step,
    pays_from,
    predicted_step,
    reduction_seconds,
    text,
)
from rsengine.checks.costs import H100_BYTES

ROW = "| report-1 | 128 | 32 | 294 | 400 | 2.05 | 0.070 | 1.54 | 103,000 | 209,000 |\n"
STEP = Step("made up", 32, 100, fixed=2e-3, each=1e-5, source="")  # 3 ms
FOUR = Cluster(4, 100e9, 50e-6)


def test_a_step_is_launches_and_what_grows_with_the_batch():
    step = predicted_step("report-1", 32, 128, "| report-1 | 1,024 | 32 | 1 | 2 | 3 | 4 | 5 |\n" + ROW)
    assert step.fixed == pytest.approx(400 * 2.25e-6) and step.seconds(128) == pytest.approx(1.54e-3)
    measured = measured_step(ROW)
    assert measured.seconds(128) == pytest.approx(MEASURED) == pytest.approx(3.151e-3, rel=1e-3)
    assert measured.fixed / measured.each == pytest.approx(step.fixed / step.each)
    with pytest.raises(ValueError, match=r"launches\.md: expected a row of quickstart, batch 256, 32 pixels"):
        predicted_step("quickstart", 32, 256, ROW)


def test_the_time_of_a_sum():
    # Of 100 MB, a ring of four carries 150 at 100 GB/s; two sums begin.
    assert reduction_seconds(FOUR, 10**8, 2) == pytest.approx(1.5e-3 + 100e-6 + 2e8 / H100_BYTES)


def test_where_several_are_faster():
    assert efficiency(STEP, 1e-3) == pytest.approx(0.75)

    def several(batch):
        return STEP.seconds(batch / 4) + 1e-3

    pays, half = pays_from(STEP, FOUR, 1e-3), half_from(STEP, FOUR, 1e-3)
    assert several(pays) <= STEP.seconds(pays) and several(pays - 1) > STEP.seconds(pays - 1)
    assert 2 * several(half) <= STEP.seconds(half) and 2 * several(half - 1) > STEP.seconds(half - 1)
    assert pays_from(STEP, FOUR, 1e-9) == 8  # two images each


def test_what_is_exchanged():
    # 26.3 M parameters, nearly all of them in bfloat16; gradients in two dtypes, and the averages.
    nbytes, sums = exchanged("report-1")
    assert sums == 3 and 2 * 26.1e6 < nbytes < 2 * 26.5e6


def test_the_document_has_what_is_predicted():
    assert text() in DOCUMENT.read_text(encoding="utf-8"), "run: python -m bench.predicted_processes"
    assert HEADING in text()
