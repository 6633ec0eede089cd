"""The parts of a GPU check, in order of value, and their rows, which are measured, recorded and limited singly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rsengine.checks.gpu.candidates import CANDIDATES

START_SECONDS = 6.0  # predicted: a process that imports PyTorch and opens the GPU


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        seconds: predicted time on an H100; see ``docs/gpu-check.md``.
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
    (Row("card", 4, 60, on_cpu=True),),
)
PARTS = (
    CARD,
    Part(
        "smoke",
        "each fused op once against eager; a tiny captured step against a plain one; profiler; feeder",
        "rsengine.checks.gpu.smoke",
        (
            Row("cross-entropy", 3, 40),
            Row("batch norm", 4, 60),
            Row("block epilogue", 6, 60),
            Row("update", 2, 40),
            Row("augmentation", 3, 40),
            Row("captured step", 4, 60),
            Row("profiler", 2, 40),
            Row("feeder", 3, 60, on_cpu=True),
        ),
    ),
    Part(
        "equality",
        "200 captured steps against 200 plain ones",
        "rsengine.checks.gpu.equality",
        (Row("float32", 12, 60), Row("bfloat16", 12, 60)),
    ),
    Part(
        "random",
        "masks and augmentations that differ between replays; resident batches that are the plain ones",
        "rsengine.checks.gpu.random_numbers",
        (Row("masks", 4, 40), Row("resident batches", 3, 40)),
    ),
    Part(
        "throughput",
        "plain, captured, resident and compiled steps in turn",
        "rsengine.checks.gpu.throughput",
        (
            Row("batch 128", 14, 60, on_cpu=True),
            Row("batch 512", 12, 60),
            _extra("batch 1024", 12, 60),
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
            Row("bfloat16, channels_last, batch 128", 9, 60, on_cpu=True),
            Row("float32, NCHW, batch 128", 9, 60),
            Row("torch.compile, batch 128", 60, 150),
            Row("bfloat16, channels_last, batch 512", 9, 60),
            _extra("torch.compile reduce-overhead, batch 128", 60, 150),
            _extra("bfloat16, channels_last, batch 1024", 10, 60),
            _extra("torch.compile, batch 512", 60, 150),
            _extra("torch.compile reduce-overhead, batch 512", 60, 150),
            _extra("torch.compile, batch 1024", 60, 150),
            _extra("torch.compile max-autotune, batch 128", 150, 240),
        ),
    ),
    Part(
        "profile",
        "one captured step: its largest kernels, kernels a step, idle share, time by part of the step",
        "rsengine.checks.gpu.profile",
        (
            Row("report-1, batch 128", 14, 60),
            _extra("report-1, batch 512", 14, 60),
            _extra("quickstart, batch 256", 10, 60),
        ),
    ),
    Part(
        "tests",
        "the kernel tests on the GPU, distributed over the cores",
        "rsengine.checks.gpu.suites",
        (Row("kernel tests", 62, 120),),
    ),
    Part(
        "train",
        "quickstart: accuracy, images/s by epoch, evaluation, time to the first step",
        "rsengine.checks.gpu.training",
        (
            Row("quickstart, FFCV", 45, 120, on_cpu=True),
            Row("quickstart, resident", 20, 90, on_cpu=True),
            _extra("quickstart, resident, plain steps", 40, 90),
        ),
    ),
    Part(
        "overlap",
        "the share of the batches' transfer that hides under kernels",
        "rsengine.checks.gpu.overlap",
        (Row("feeder into captured steps", 6, 50),),
    ),
    Part(
        "kernels",
        "every compile case against its bound at the copy rate measured there, and against eager",
        "rsengine.checks.gpu.kernels",
        (
            Row("block_epilogue", 33, 100),
            Row("ema", 8, 60),
            _extra("batch_norm", 30, 100),
            _extra("squeeze_excite", 33, 100),
            _extra("cross_entropy", 25, 90),
            _extra("augment", 25, 90),
        ),
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
)
