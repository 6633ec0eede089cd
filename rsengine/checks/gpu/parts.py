"""The parts of a GPU check, in order of value, and their rows, which are measured, recorded and limited singly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rsengine.checks.gpu.candidates import CANDIDATES

START_SECONDS = 5.0  # of a process that imports PyTorch and opens the GPU


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        seconds: predicted time, from what rows took on an H200; see ``docs/gpu-check.md``.
        limit: seconds after which it is ended.
        essential: belongs to a first call. The other rows follow as time allows.
        on_cpu: makes sense in a dry run without a GPU.
    """

    name: str
    seconds: float
    limit: float
    essential: bool = True
    on_cpu: bool = False


@dataclass(frozen=True)
class Part:
    """Rows that share a process. ``module``: has ``measure(row, setup)``."""

    name: str
    what: str
    module: str
    rows: tuple[Row, ...]

    def seconds(self, essential: bool) -> float:
        """Predicted time of its essential rows, or of the others, with the start of their process."""
        rows = [row.seconds for row in self.rows if row.essential == essential]
        return sum(rows) + (START_SECONDS if rows else 0.0)


def _extra(name: str, seconds: float, limit: float) -> Row:
    return Row(name, seconds, limit, essential=False)


def outcome(result: dict[str, Any]) -> str:
    """A row's result in words."""
    return "; ".join(result.get("wrong", [])) or result.get("left_out") or "well"


CARD = Part(  # belongs to every call
    "card",
    "name, versions, clocks, copy rate and product rate; which implementation of each op runs, and why",
    "rsengine.checks.gpu.card",
    (Row("card", 1, 60, on_cpu=True),),
)
PARTS = (
    CARD,
    Part(
        "compilation",
        "the kernels of the parts that follow, compiled by all cores at once",
        "rsengine.checks.gpu.compilation",
        (Row("kernels of the steps", 30, 90),),
    ),
    Part(
        "smoke",
        "each fused op once against eager; a tiny captured step against a plain one; profiler; feeder",
        "rsengine.checks.gpu.smoke",
        (
            Row("cross-entropy", 6, 40),
            Row("batch norm", 3, 60),
            Row("block epilogue", 6, 60),
            Row("update", 1, 40),
            Row("augmentation", 2, 40),
            Row("captured step", 6, 60),
            Row("profiler", 1, 40),
            Row("feeder", 9, 60, on_cpu=True),
        ),
    ),
    Part(
        "equality",
        "200 captured steps against 200 plain ones",
        "rsengine.checks.gpu.equality",
        (Row("float32", 25, 90), Row("bfloat16", 22, 90)),
    ),
    Part(
        "random",
        "masks and augmentations that differ between replays; resident batches that are the plain ones",
        "rsengine.checks.gpu.random_numbers",
        (Row("masks", 8, 40), Row("resident batches", 3, 40)),
    ),
    Part(
        "tests",
        "the kernel tests on the GPU, distributed over the cores",
        "rsengine.checks.gpu.suites",
        (_extra("kernel tests", 130, 240),),
    ),
    Part(
        "kernels",
        "every compile case against its bound at the copy rate measured there, and against eager",
        "rsengine.checks.gpu.kernels",
        (
            _extra("block_epilogue", 45, 100),
            _extra("ema", 10, 60),
            _extra("batch_norm", 40, 100),
            _extra("squeeze_excite", 45, 100),
            _extra("cross_entropy", 30, 90),
            _extra("augment", 25, 90),
        ),
    ),
    Part(
        "throughput",
        "plain, captured, resident and compiled steps in turn",
        "rsengine.checks.gpu.throughput",
        (
            Row("batch 128", 35, 90, on_cpu=True),
            _extra("batch 512", 45, 90),
            _extra("batch 1024", 45, 90),
            _extra("compiled, batch 128", 110, 200),
            _extra("compiled, batch 512", 90, 200),
            _extra("compiled, batch 1024", 90, 200),
        ),
    ),
    Part(
        "baselines",
        "timm's resnetrs50 in a plain loop, each in turn with our captured step",
        "bench.gpu_baselines",
        (
            Row("bfloat16, channels_last, batch 128", 34, 90, on_cpu=True),
            Row("torch.compile, batch 128", 73, 150),
            _extra("torch.compile reduce-overhead, batch 128", 80, 150),
            _extra("bfloat16, channels_last, batch 512", 40, 90),
            _extra("float32, NCHW, batch 128", 36, 90),
            _extra("bfloat16, channels_last, batch 1024", 45, 90),
            _extra("torch.compile, batch 512", 80, 150),
            _extra("torch.compile reduce-overhead, batch 512", 80, 150),
            _extra("torch.compile, batch 1024", 80, 150),
            _extra("torch.compile max-autotune, batch 128", 150, 240),
        ),
    ),
    Part(
        "profile",
        "one captured step: its largest kernels, kernels a step, idle share, time by part of the step",
        "rsengine.checks.gpu.profile",
        (
            Row("report-1, batch 128", 8, 60),
            _extra("report-1, batch 512", 20, 60),
            _extra("quickstart, batch 256", 10, 60),
        ),
    ),
    Part(
        "train",
        "quickstart: accuracy, images/s by epoch, evaluation, time to the first step",
        "rsengine.checks.gpu.training",
        (
            Row("quickstart, resident", 54, 120, on_cpu=True),  # 28 of them convert the data
            Row("quickstart, FFCV", 38, 120, on_cpu=True),
            _extra("quickstart, resident, plain steps", 40, 90),
        ),
    ),
    Part(
        "overlap",
        "the share of the batches' transfer that hides under kernels",
        "rsengine.checks.gpu.overlap",
        (Row("feeder into captured steps", 9, 50),),
    ),
    Part(
        "speedrun",
        "the recipe speedrun: time to 91.19 % on the test set",
        "rsengine.checks.gpu.training",
        (_extra("speedrun, resident", 90, 240),),
    ),
    Part(
        "candidates",
        "recipes to choose from for a GPU, on a validation split: accuracy and seconds",
        "rsengine.checks.gpu.training",
        tuple(_extra(name, 40, 120) for name in CANDIDATES),
    ),
    Part(
        "bench",
        "bench/test_kernels.py, a run for each op",
        "rsengine.checks.gpu.suites",
        (
            _extra("test_squeeze_excite_residual", 25, 80),
            _extra("test_sgd_ema_step", 12, 60),
            _extra("test_ema_update", 10, 60),
            _extra("test_label_smoothed_cross_entropy", 20, 80),
            _extra("test_batch_norm", 25, 80),
        ),
    ),
    Part(
        "processes",
        "two GPUs that share batches: captured steps with their all-reduce against plain ones; images/s of one and two",
        "rsengine.checks.gpu.processes",
        (_extra("two GPUs", 60, 180),),
    ),
)
