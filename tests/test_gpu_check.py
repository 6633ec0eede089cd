"""The layout of what a GPU check writes, on synthetic results; and that without a GPU nothing is written."""

import pytest
import torch

from rsengine import gpu_check

RESULTS = {
    "machine": {
        "gpu": "Example GPU",
        "capability": "9.0",
        "memory_gib": "80",
        "multiprocessors": "132",
        "torch": "2.14.1",
        "cuda": "13.0",
        "triton": "3.8.0",
        "python": "3.11.2",
        "date": "2026-01-01",
    },
    "copy_gb_per_s": 2987.6,
    "cases": [
        {
            "op": "ema",
            "case": "sgd_ema_step fp32",
            "floor_bytes": 943_000_000,
            "predicted_us": 315.6,
            "measured_us": 350.0,
        },
        {"op": "ema", "case": "ema_update fp32", "error": "RuntimeError: no"},
    ],
    "tests": {"passed": 200, "failed": 1, "skipped": 2, "failures": ["test_x: AssertionError"]},
    "benchmarks": {
        "rows": [
            {
                "name": "test_sgd_ema_step[triton]",
                "median_us": 400.0,
                "rounds": 200,
                "GB/s": 2357.5,
                "of_copy_bandwidth": 0.789,
                "times_faster_than_eager": 2.1,
                "times_faster_than_foreach_sgd_and_ema": 3.3,
            }
        ]
    },
    "seconds": 300,
}


def test_the_tables():
    lines = gpu_check.render(RESULTS).splitlines()
    assert lines[0] == "# Measured on Example GPU"
    assert "200 passed, 1 failed, 2 skipped." in lines
    assert "- test_x: AssertionError" in lines
    assert "| sgd_ema_step fp32 | 943,000,000 | 315.6 | 350.0 | 1.11 |" in lines
    assert "| ema_update fp32 | | | failed: RuntimeError: no | |" in lines
    assert (
        "| `test_sgd_ema_step[triton]` | 400.0 | 200 | 2357.5 | 0.789 | eager 2.1, foreach_sgd_and_ema 3.3 |" in lines
    )
    for first, row in zip(lines, lines[1:], strict=False):  # every row of a table has the columns of the one above
        if first.startswith("|") and row.startswith("|"):
            assert first.count("|") == row.count("|"), row


def test_what_counts_as_well():
    well = RESULTS | {"cases": RESULTS["cases"][:1], "tests": RESULTS["tests"] | {"failures": []}}
    assert gpu_check.all_well(well)
    assert not gpu_check.all_well(RESULTS)
    assert not gpu_check.all_well(well | {"benchmarks": {"rows": [], "error": "not finished"}})


def test_reading_a_report_of_pytest(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="E: no\nmore"/></testcase>'
        '<testcase name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    found = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    gpu_check.read_report(report, found)
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["b: E: no more"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_changes_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    assert gpu_check.main() == 0
    assert "no usable CUDA GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
