"""The layout of what a GPU check writes, on synthetic results; and the command where there is nothing to run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rsengine import gpu_check
from rsengine.checks.gpu import report, suites, training
from rsengine.checks.gpu.candidates import CANDIDATES, arguments
from rsengine.checks.gpu.device import Cpu
from rsengine.checks.gpu.parts import PARTS
from rsengine.config import load_recipe
from rsengine.data.find import VARIABLE
from rsengine.errors import SettingsError
from tests.checks.gpu.stand_in import StandIn, setup

ROOT = Path(__file__).parents[3]


def way(rate, **more):
    return {
        "images_per_second": rate, "step_ms": 128e3 / rate, "step_ms_range": [1.0, 2.0], "host_ms": 0.05,
        "host_waits": None, "kernels": 900, "idle_share": 0.02, **more,
    }  # fmt: skip


def baseline(name, batch, rate, faster):
    return {
        "baseline": f"timm resnetrs50, {name}", "batch_size": batch, "rounds": 5, "round_steps": 20, "wrong": [],
        "images_per_second": rate, "rsengine_images_per_second": rate * faster, "times_faster": faster,
        "times_faster_range": [faster - 0.1, faster + 0.1],
    }  # fmt: skip


def largest(name, rate, flops):
    return {
        "name": name,
        "count": 56,
        "us": 300.0,
        "share": 0.3,
        "gb_per_s": rate,
        "tflop_per_s": flops,
        "parts": ["p"],
    }


def case(name, ours, eager):
    return {"case": name, "bytes": 943_000_000, "bound_us": 315.6, "ours_us": ours, "eager_us": eager}


EQUAL = {
    "steps": 200, "first_difference": None, "loss_difference": 0.0, "weight_difference": 2e-6,
    "late_loss_difference": 1e-3, "learned": True, "wrong": [],
}  # fmt: skip
RUN = {
    "first_step_s": 21.5, "graph": True, "epochs": [1, 2], "accuracy": [0.5, 0.795], "evaluation_s": [0.3, 0.2],
    "images_per_second": [40_000.0, 41_000.0], "run_seconds": 18.5, "seconds": 71.2, "goal": 0.9119,
    "seconds_to_goal": None, "wrong": [], "data": "cifar10",
}  # fmt: skip
DEVICE = {
    "name": "Example GPU", "copy_gb_per_s": 2987.6, "product_tflop_per_s": 700.0, "cuda": "13.0", "clocks": "1,980 MHz",
    "host": {"python": "3.12.1", "torch": "2.11.0", "ffcv": None},
}  # fmt: skip
RESULTS = {
    "card": {"card": {"device": DEVICE, "choices": [], "wrong": [], "seconds": 5.0}},
    "smoke": {
        "feeder": {"left_out": "FFCV is not installed", "seconds": 0.1, "source": "abc"},
        "update": {"wrong": ["Triton and eager differ by 0.3, relative"], "seconds": 1.2},
    },
    "equality": {
        "float32": EQUAL,
        "bfloat16": EQUAL | {"first_difference": {"step": 17, "largest": "model.fc.weight"}},
    },
    "throughput": {
        "batch 128": {
            "ways": {
                "plain": way(4000.0, host_waits="called a synchronizing CUDA operation"),
                "captured": way(52_000.0),
                "captured, resident": {"error": "RuntimeError: no"},
                "captured, cudnn.benchmark": way(53_000.0, profile_error="expected 11 equal rounds"),
            },
            "wrong": ["captured, resident: RuntimeError: no"],
        }
    },
    "baselines": {
        "a": baseline("float32, NCHW", 128, 4_000.0, 12.0),
        "b": baseline("torch.compile", 128, 9_000.0, 5.5),
        "c": baseline("bfloat16, channels_last", 512, 12_000.0, 4.0),
        "d": {"wrong": ["the process was ended by SIGKILL"]},
    },
    "profile": {
        "report-1, batch 128": {
            "kernels": 900, "kernel_us": 1000.0, "idle_share": 0.1, "step_ms": 1.1, "operators": 793,
            "copy_gb_per_s": 3000.0, "product_tflop_per_s": 700.0, "wrong": [],
            "largest": [largest("batch_norm_kernel", 1500.0, 1.0), largest("gemm | bf16", 300.0, 350.0)],
            "parts": [{"part": "batch norm", "us": 600.0, "share": 0.6, "kernels": 300}],
        }
    },
    "tests": {
        "kernel tests": {"passed": 200, "failed": 1, "skipped": 2, "slowest": [], "wrong": ["test_x: AssertionError"]}
    },
    "train": {"quickstart, FFCV": RUN, "quickstart, resident": {"left_out": "FFCV is not installed"}},
    "speedrun": {"speedrun, resident": RUN | {"seconds_to_goal": 12.3}},
    "overlap": {"feeder into captured steps": {"steps": 24, "overlap": 0.93, "wrong": []}},
    "kernels": {
        "ema": {
            "copy_gb_per_s": 2900.0, "rounds": 10, "wrong": ["ema_update: RuntimeError: no"],
            "cases": [
                case("sgd_ema_step", 350.0, 700.0), case("slow", 350.0, 70.0), {"case": "ema_update", "error": "no"},
            ],
        }
    },
    "bench": {
        "test_sgd_ema_step": {
            "rows": [
                {"name": "test_sgd_ema_step[triton]", "median_us": 400.0, "rounds": 200, "GB/s": 2357.5,
                 "of_copy_bandwidth": 0.789, "times_faster_than_eager": 2.1, "times_faster_than_foreach": 3.3}
            ],
            "wrong": [],
        }
    },
}  # fmt: skip
CALLS = [{"command": "python -m rsengine.gpu_check", "date": "2026-01-01 10:00:00", "seconds": 300, "source": "abc"}]


def test_the_story_comes_first_and_says_what_matters():
    lines = report.render(RESULTS, CALLS).splitlines()
    assert lines[0] == "# Measured on Example GPU"
    assert "- `python -m rsengine.gpu_check`, 2026-01-01 10:00:00, 300 s, source abc" in lines
    story = lines[lines.index("## In short") : lines.index("## The step, run in each way")]
    for line in (
        "- Example GPU: a copy moves 2,988 GB/s (read and written), a bfloat16 matrix product makes 700.0 TFLOP/s",
        "- batch 128: 49,500 images/s, 5.50 times timm resnetrs50, torch.compile (9,000), the best of 2 baselines; "
        "median of 5 rounds in turn",
        "- batch 512: 48,000 images/s, 4.00 times timm resnetrs50, bfloat16, channels_last (12,000), the best of 1 "
        "baselines; median of 5 rounds in turn",
        "- report-1, batch 128: 900 kernels a captured step, 1.00 ms of them, idle 10%; batch norm 60%",
        "- 30% 56 × batch_norm_kernel, 1,500 GB/s (50% of the copy) (p)",
        "- 30% 56 × gemm | bf16, 350.0 TFLOP/s (50% of the product) (p)",
        "- kernels: 1 of 2 cases are no slower than eager",
        "- slower than eager: slow: 350.0 µs, eager 70.0",
        "- captured against plain, float32: 200 steps, equal to the bit; largest difference of a loss 0, of a tensor "
        "2e-06",
        "- kernel tests, natively: 200 passed, 1 failed, 2 skipped",
        "- 93% of the time of the batches' copies lies under kernels",
        "- quickstart, FFCV, cifar10: 79.50% after 2 epochs in 18.5 s; 41,000 images/s in the last; first step after "
        "21.5 s",
        "- left out: smoke, feeder: FFCV is not installed",
        "- **wrong**: smoke, update: Triton and eager differ by 0.3, relative",
        "- **wrong**: baselines, d: the process was ended by SIGKILL",
    ):
        assert line in story, line
    assert any("equal until step 17 (model.fc.weight differs first)" in line for line in story)
    assert any("in 18.5 s, 91.19% after 12.3 s" in line for line in story)
    assert any(line.startswith("- not measured: compilation; smoke (cross-entropy") for line in story)


def test_the_tables():
    text = report.render(RESULTS, CALLS)
    lines = text.splitlines()
    for line in (
        "| batch 128 | captured | 52,000 | 2.462 | 1.000 to 2.000 | 0.050 | 900 | 2% | no |",
        "| batch 128 | captured, resident | RuntimeError: no |  |  |  |  |  |  |",
        "| timm resnetrs50, torch.compile | 128 | 9,000 | 49,500 | 5.50 (5.40 to 5.60) |",
        "| sgd_ema_step | 943,000,000 | 315.6 | 350.0 | 1.11 | 2.00 |",
        "| ema_update | no |  |  |  |  |",
        "| quickstart, FFCV | cifar10 | 2 | 79.50% | 41,000 | 0.20 |",
        "| `test_sgd_ema_step[triton]` | 400.0 | 200 | 2357.5 | 0.789 | eager 2.1, foreach 3.3 |",
        "| smoke | feeder | FFCV is not installed | 0 | 9 | abc |",
    ):
        assert line in lines, line
    assert "called a synchronizing CUDA operation |" in text
    for first, row in zip(lines, lines[1:], strict=False):  # every row of a table has the columns of the one above
        if first.startswith("|") and row.startswith("|") and "gemm" not in first + row:  # see the next test
            assert first.count("|") == row.count("|"), row


def test_a_name_with_a_bar_does_not_break_a_table():
    (row,) = [line for line in report.render(RESULTS, CALLS).splitlines() if line.startswith("| `gemm")]
    assert row.replace("\\|", "").count("|") == 7


def test_the_summary_is_short_however_much_is_wrong():
    assert len(report.summary(RESULTS)) <= report.SUMMARY_LINES
    many = {"tests": {"kernel tests": RESULTS["tests"]["kernel tests"] | {"wrong": ["no"] * 500}}}
    lines = report.summary(RESULTS | many)
    assert (
        len(lines) <= report.SUMMARY_LINES
        and f"  and {len(report.failures(RESULTS | many)) - report.SHOWN_WRONG} more" in lines
    )
    assert max(map(len, lines)) <= 1000
    assert lines[-1].startswith("not measured yet; call again to go on: compilation; smoke (cross-entropy")


def test_what_a_dry_run_cannot_measure_is_not_missing():
    card = {"card": {"card": {"device": DEVICE | {"name": Cpu.name}, "wrong": []}}}
    assert not [line for line in report.missing(card) if line.startswith(("equality", "smoke (cross"))]
    assert any(line.startswith("throughput") for line in report.missing(card))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_single_pass_forward", "_single_pass_forward"),
        ("void at::native::(anonymous namespace)::batch_norm<float>(int)", "batch_norm<float>(int)"),
        (
            "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::CUDAFunctor_add"
            "<c10::BFloat16> >(at::TensorIteratorBase&, at::native::CUDAFunctor_add<c10::BFloat16> const&)",
            "elementwise_kernel<… gpu_kernel_impl_nocast CUDAFunctor_add …>",
        ),
        ("x" * 200, "x" * 79 + "…"),
    ],
)
def test_a_long_name_of_a_kernel_says_what_it_computes(name, expected):
    assert report.short(name) == expected


def test_a_summary_of_nothing():
    assert report.summary({}) == [
        "nothing is wrong in what was measured",
        "not measured yet; call again to go on: " + "; ".join(part.name for part in PARTS),
    ]
    assert report.render({}, []).startswith("# Measured on a device that did not say its name")


# --- the parts that run other commands --------------------------------------------------------------------------------


def write_tests(folder, **files):
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)


def test_the_kernel_tests_are_dealt_out_and_lose_nothing(tmp_path):
    write_tests(
        tmp_path,
        good="import pytest\n@pytest.mark.parametrize('i', range(10))\ndef test_it(i): assert i != 7\n",
        skips="import pytest\ndef test_skips(): pytest.skip('no')\n",
    )
    found = suites.kernel_tests(tmp_path, 100, processes=3)
    assert (found["passed"], found["failed"], found["skipped"], found["processes"]) == (9, 1, 1, 3)
    assert len(found["wrong"]) == 1 and found["wrong"][0].startswith("test_good.py::test_it[7]: ")


def test_kernel_tests_that_crash_or_hang_leave_what_passed(tmp_path):
    write_tests(
        tmp_path,
        a="def test_first(): pass\n",
        b="import os, time\ndef test_second(): time.sleep(600)\n",
        c="def test_third(): pass\n",
        d="import os\ndef test_fourth(): os._exit(9)\n",
    )
    found = suites.kernel_tests(tmp_path, 8, processes=2)
    assert found["passed"] == 2
    assert any("was not finished in its time" in line for line in found["wrong"])
    assert suites.kernel_tests(tmp_path / "missing", 20)["left_out"]


def test_the_words_that_say_most_of_a_log_are_its_last_error():
    log = "collected\nE   ModuleNotFoundError: No module named 'x'\n=== short ===\n1 error in 0.3s\n"
    assert suites.last_words(log) == "ModuleNotFoundError: No module named 'x'"
    assert suites.last_words("a\nerror: no data set: set RSENGINE_DATA\nb") == "error: no data set: set RSENGINE_DATA"
    assert suites.last_words("RuntimeError: no\n") == "RuntimeError: no"
    assert suites.last_words("one\ntwo\n") == "two" and suites.last_words("") == "nothing"


def test_no_test_is_wrong(tmp_path):
    found = suites.kernel_tests(tmp_path, 60, processes=1)
    assert found["wrong"] == ["no test passed"]


def test_many_failures_are_cut(tmp_path):
    file = tmp_path / "outcomes.jsonl"
    line = {"name": "t", "outcome": "failed", "seconds": 1, "message": "no"}
    file.write_text((json.dumps(line) + "\n") * 100)
    found = suites.outcomes([file, tmp_path / "missing"])
    assert found["failed"] == 100 and len(found["wrong"]) == suites.SHOWN_FAILURES + 1
    assert found["wrong"][-1] == "and 60 more"


def test_the_summary_of_a_run():
    epoch = {"kind": "epoch", "test_accuracy": 0.9, "test_accuracy_ema": None, "images_per_second": 1.0}
    epoch |= {"eval_seconds": 0.5}
    records = [
        {"kind": "start", "time_to_first_step": 2.5, "graph": True},
        {"kind": "interval"},
        epoch | {"epoch": 1, "seconds": 10.0},
        epoch | {"epoch": 2, "seconds": 20.0, "test_accuracy_ema": 0.912},
        epoch | {"epoch": 3, "seconds": 30.0, "test_accuracy_ema": 0.92},
    ]
    found = training.summary(records, 0.9119)
    assert found["accuracy"] == [0.9, 0.912, 0.92] and found["seconds_to_goal"] == 20.0 and found["run_seconds"] == 30.0
    assert found["first_step_s"] == 2.5 and training.summary([], 0.9119)["run_seconds"] is None
    assert training.summary(records, None)["seconds_to_goal"] is None  # the goal is one of CIFAR-10


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_changes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("GPU_DEVICE", raising=False)
    assert gpu_check.main(["--out", str(tmp_path / "results")]) == 0
    assert "no usable CUDA GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--parts", "smoke,compile"],
            "--parts: no part is called compile; there are card, compilation, smoke, equality,",
        ),
        (["--parts", " , "], "--parts: no part is named; there are card, compilation, smoke,"),
        (["--seconds", "nan"], "--seconds: expected at least 15; got nan"),
        (["--seconds", "-5"], "--seconds: expected at least 15; got -5"),
        (["--out", "file/x"], "[Errno 20] Not a directory: "),
    ],
)
def test_a_bad_argument_is_one_line_with_the_remedy(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert gpu_check.main(["--device", "cpu", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {said}") and captured.err.count("\n") == 1 and captured.out == ""


def test_an_empty_name_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        gpu_check.main(["--device", "cpu", "--out", " "])
    assert left.value.code == 2 and capsys.readouterr().err.startswith("error: --out: got an empty text; ")


def test_another_device_in_the_environment_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("GPU_DEVICE", "tpu")
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err == "error: GPU_DEVICE: expected cuda or cpu; got 'tpu'\n"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"calls": [', '{"calls": [], "parts": []}', '{"calls": [{}], "parts": {}}',
     '{"calls": [], "parts": {"card": null}}', '{"calls": [], "parts": {"baselines": {"a": {"x": 1}}}}'],
)  # fmt: skip
def test_a_damaged_earlier_result_is_refused(text, tmp_path):
    (tmp_path / "gpu-x.json").write_text(text)
    with pytest.raises(SettingsError, match=r"gpu-x.json: not a result of this check \(.*\); move it away"):
        gpu_check.earlier("gpu-x", [tmp_path])


def test_what_cannot_be_written_is_said_once_and_printed_all_the_same(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gpu_check, "write_atomically", full)
    arguments = ["--device", "cpu", "--parts", "card", "--seconds", "60", "--out", str(tmp_path)]
    assert gpu_check.main(arguments) == 1
    output = capsys.readouterr().out
    assert output.count("cannot write") == 1 and "not written: " in output and Cpu.name in output


def test_a_second_call_into_the_same_folder_is_refused(tmp_path):
    refused = pytest.raises(SettingsError, match="another call is running there; wait, or name another")
    with gpu_check.alone_in(tmp_path), refused, gpu_check.alone_in(tmp_path):
        pass
    with gpu_check.alone_in(tmp_path):
        pass


def test_the_times_on_paper_are_those_of_the_parts(capsys):
    assert gpu_check.main(["--list"]) == 0
    listing = capsys.readouterr().out
    assert listing.strip() in (ROOT / "docs" / "gpu-check.md").read_text()
    assert gpu_check.main(["--list", "--parts", "train,smoke"]) == 0
    assert [line.split("`")[1] for line in capsys.readouterr().out.splitlines()[2:-1]] == ["card", "train", "smoke"]


def test_a_second_call_of_the_day_goes_on_wherever_the_first_wrote(tmp_path, capsys):
    assert gpu_check.earlier("gpu-x", [tmp_path]) == {"calls": [], "parts": {}}
    (tmp_path / "gpu-x.json").write_text(json.dumps({"calls": CALLS, "parts": RESULTS}))
    assert gpu_check.earlier("gpu-x", [tmp_path / "none", tmp_path])["calls"] == CALLS
    assert "going on with" in capsys.readouterr().out


def test_the_digest_of_the_sources_is_the_same_twice():
    command = [sys.executable, "-c", "from rsengine.gpu_check import source_digest; print(source_digest())"]
    other = subprocess.run(command, cwd=ROOT, text=True, capture_output=True).stdout.strip()
    assert other == gpu_check.source_digest() and len(other) == 12


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_is_a_recipe_of_resident_data(name):
    words = arguments(name)
    settings = [setting for flag, setting in zip(words[2::2], words[3::2], strict=True) if flag == "--set"]
    recipe = load_recipe(words[1]).with_settings(settings)
    assert recipe.train.loader == "resident" and len(settings) == len(CANDIDATES[name]) + 2


def test_a_candidate_without_a_source_to_split_is_left_out(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert "RSENGINE_DATA does not name a source" in training.measure("speedrun", setup())["left_out"]
    (tmp_path / "dataset.json").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert "RSENGINE_DATA does not name a source" in training.measure("speedrun", setup())["left_out"]


@pytest.mark.thorough
def test_a_candidate_runs_on_a_validation_split(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    device = StandIn()
    device.is_gpu = False  # a dry run: a few steps on the digits
    found = training.measure("speedrun", setup(device))
    assert found["wrong"] == [] and found["epochs"] == [2] and found["seconds_to_goal"] is None
