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
    "step": {
        "equality": {
            "steps": 200,
            "loss_difference": 0.0,
            "weight_difference": 2e-6,
            "bf16_loss_difference": 0.001,
            "learned": True,
            "equal": True,
        },
        "random_numbers": {"masks_differ": True, "batches_differ": True, "batches_are_the_plain_ones": True},
        "overlap": {"steps": 24, "overlap": 0.93},
        "throughput": [
            {"way": "plain", "images_per_second": 4000.0, "host_ms": 30.1, "idle_share": 0.4},
            {"way": "captured", "images_per_second": 12000.0, "host_ms": 0.05, "idle_share": 0.02},
            {"way": "captured + compiled", "error": "left out: the time for this part was over"},
        ],
        "seconds": 90,
    },
    "seconds": 300,
}
STEP = RESULTS["step"]
STEP_WELL = STEP | {"throughput": STEP["throughput"][:2]}


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
    assert "| captured | 12,000 | 0.05 | 2.0% |" in lines
    assert "| captured + compiled | | | left out: the time for this part was over |" in lines
    assert any("a loss 0 (tolerance 0.001)" in line and "buffer 2e-06 (tolerance 0.01)" in line for line in lines)
    assert "- 93% of the copies' time lies under kernels" in lines
    for first, row in zip(lines, lines[1:], strict=False):  # every row of a table has the columns of the one above
        if first.startswith("|") and row.startswith("|"):
            assert first.count("|") == row.count("|"), row


def test_what_counts_as_well():
    well = RESULTS | {"cases": RESULTS["cases"][:1], "tests": RESULTS["tests"] | {"failures": []}, "step": STEP_WELL}
    assert gpu_check.all_well(well)
    assert not gpu_check.all_well(RESULTS)
    assert not gpu_check.all_well(well | {"benchmarks": {"rows": [], "error": "not finished"}})


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("equality", {"equal": False}),
        ("equality", {"learned": False}),
        ("random_numbers", {"masks_differ": False}),
        ("random_numbers", {"batches_are_the_plain_ones": False}),
        ("overlap", {"error": "RuntimeError: no"}),
        ("equality", {"error": "RuntimeError: no"}),
    ],
)
def test_what_is_wrong_with_the_step_is_said_and_counts(part, change):
    step = STEP_WELL | {part: STEP_WELL[part] | change}
    well = RESULTS | {"cases": RESULTS["cases"][:1], "tests": RESULTS["tests"] | {"failures": []}}
    assert gpu_check.all_well(well | {"step": STEP_WELL}) and not gpu_check.all_well(well | {"step": step})
    assert sum("**wrong**" in line for line in gpu_check.render(well | {"step": step}).splitlines()) == 1


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
