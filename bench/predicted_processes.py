"""`python -m bench.predicted_processes`: write into docs/distributed.md what several GPUs may gain. Nothing is measured
here: it is arithmetic on a step's time on one GPU, on the bytes of its gradients and on the data sheets of links."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.baselines import CLASSES, MEAN, STD
from bench.markdown import write_section
from rsengine.checks.costs import H100_BYTES, LAUNCH_SECONDS
from rsengine.config import load_recipe
from rsengine.device import Execution
from rsengine.engine.build import build_model
from rsengine.engine.reduction import GradientReduction
from rsengine.engine.step import TrainStep
from rsengine.model.preprocess import Preprocess
from rsengine.parallel.ranks import Ranks

DOCS = Path(__file__).parent.parent / "docs"
DOCUMENT, LAUNCHES = DOCS / "distributed.md", DOCS / "launches.md"
HEADING = "## On several GPUs: predicted, not measured"


@dataclass(frozen=True)
class Cluster:
    """GPUs, the bytes a second that a ring through all of them carries, and the seconds that a sum takes to begin."""

    gpus: int
    bandwidth: float
    latency: float


# NVLink 4: 900 GB/s a GPU, 450 each way. InfiniBand NDR: 400 Gb/s a GPU, so 400 GB/s between nodes of eight, whose
# rings use all of their adapters. The latencies are assumed.
CLUSTERS = (Cluster(8, 450e9, 30e-6), Cluster(64, 400e9, 100e-6))


@dataclass(frozen=True)
class Step:
    """The time of a step on one GPU: ``fixed`` seconds, and ``each`` for each image."""

    recipe: str
    side: int
    batch: int
    fixed: float
    each: float
    source: str

    def seconds(self, batch: float) -> float:
        return self.fixed + self.each * batch


# (recipe, pixels a side, images a GPU)
PREDICTED = (("report-1", 32, 1024), ("quickstart", 32, 256), ("speedrun", 16, 512), ("speedrun", 32, 512))
# Images/s of report-1 with 128 images.
MEASURED_RATE, MEASURED_ON = 40_620, "one NVIDIA H200 with torch 2.11"
MEASURED = 128 / MEASURED_RATE


INTRODUCTION = """\
Written by `python -m bench.predicted_processes`. **Nothing here was run on two GPUs.** It says what the bytes and the
published bandwidths allow:

- *step*: of one GPU with its images. Measured: {measured}, {rate} images/s.
  Predicted: [launches.md](launches.md), on an H100. Either is split into what launches take, which is the same for any
  batch: *f*, {launch} µs a kernel; and the rest, which grows with the images: *e* for each. The measured step is split
  in the proportions of the predicted one.
- *all-reduce*: 2 (N − 1) / N · bytes / bandwidth, as in a ring, none of it hidden under the backward pass. In one node
  of eight the bandwidth is 450 GB/s: NVLink 4 has 900 GB/s a GPU, half of it each way. Between eight such nodes it is
  400 GB/s: each of the eight GPUs of a node has InfiniBand of 400 Gb/s, and rings use all of them. Added are 2 · bytes
  at {memory} TB/s for the copy into the buffer, and an assumed latency of {near} µs in a node and {far} µs between
  nodes for each sum: of the bfloat16 gradients, of the float32 ones, and of the averages of batch norm.
- *efficiency*: step / (step + all-reduce), which is images/s over N times those of one GPU with as many images.
- *faster than one from*: the batch of all GPUs together below which one GPU alone is as fast,
  all-reduce / (e (1 − 1 / N)), and at least two images a GPU. *Half of N times from*: the batch below which N GPUs are
  less than N / 2 times as fast as one GPU with the same batch, (N (f + all-reduce) − 2 f) / e.

| network | images a GPU | step, ms | GPUs | MB | all-reduce, ms | images/s | efficiency | faster than one from | \
half of N times from |
|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"""


def predicted_step(recipe: str, side: int, batch: int, document: str) -> Step:
    """A row of docs/launches.md: its launches are ``fixed``, and what is left grows with the batch."""
    numbers = r" *([\d,.]+) \|"
    row = re.search(rf"^\| {recipe} \| {batch:,} \| {side} \|{numbers * 5}", document, re.MULTILINE)
    if row is None:
        raise ValueError(f"{LAUNCHES}: expected a row of {recipe}, batch {batch:,}, {side} pixels")
    _, kernels, _, _, milliseconds = (float(number.replace(",", "")) for number in row.groups())
    fixed = kernels * LAUNCH_SECONDS
    return Step(recipe, side, batch, fixed, (milliseconds / 1e3 - fixed) / batch, "predicted")


def measured_step(document: str) -> Step:
    """report-1 as measured at one batch, with the shares of the predicted step at that batch."""
    predicted = predicted_step("report-1", 32, 128, document)
    slower = MEASURED / predicted.seconds(128)
    return Step("report-1", 32, 128, slower * predicted.fixed, slower * predicted.each, "measured")


def reduction_seconds(cluster: Cluster, nbytes: int, sums: int) -> float:
    """Copying the gradients into their buffer, the ring's ``2 (N - 1) / N`` times their bytes, and ``sums`` starts."""
    ring = 2 * (cluster.gpus - 1) / cluster.gpus * nbytes / cluster.bandwidth
    return 2 * nbytes / H100_BYTES + ring + sums * cluster.latency


def efficiency(step: Step, reduction: float) -> float:
    """Images/s of N GPUs, each with ``step.batch`` images, over N times those of one."""
    alone = step.seconds(step.batch)
    return alone / (alone + reduction)


def pays_from(step: Step, cluster: Cluster, reduction: float) -> int:
    """The least batch, of all GPUs together, at which they are faster than one of them with all of it.

    ``fixed + each B / N + reduction < fixed + each B``. At least 2 images for each GPU, as batch norm needs.
    """
    return max(math.ceil(reduction / (step.each * (1 - 1 / cluster.gpus))), 2 * cluster.gpus)


def half_from(step: Step, cluster: Cluster, reduction: float) -> int:
    """The least batch at which they are N / 2 times as fast as one with all of it."""
    n = cluster.gpus
    return max(math.ceil((n * (step.fixed + reduction) - 2 * step.fixed) / step.each), 2 * n)


def exchanged(recipe_name: str) -> tuple[int, int]:
    """Bytes that each GPU gives to the sums of a step, with bfloat16 copies of the weights, and how many sums."""
    recipe = load_recipe(recipe_name)
    execution = Execution(torch.device("cpu"), torch.bfloat16, 1, "prediction")
    step = TrainStep(
        build_model(recipe, CLASSES),
        recipe,
        Preprocess(MEAN, STD, execution.device),
        execution,
        1,
        weight_copies=True,
        ranks=Ranks(0, 8, 0, 8, "nccl"),
    )
    reduction = step.update.reduction
    assert isinstance(reduction, GradientReduction)
    averages = sum(buffer.nbytes for buffer in reduction.buffers)
    return reduction.nbytes + averages, len(reduction.flat) + bool(averages)


def text() -> str:
    """The section of the document."""
    document = LAUNCHES.read_text(encoding="utf-8")
    steps = [measured_step(document), *(predicted_step(*row, document) for row in PREDICTED)]
    sizes = {name: exchanged(name) for name in dict.fromkeys(step.recipe for step in steps)}
    near, far = (round(cluster.latency * 1e6) for cluster in CLUSTERS)
    facts = {"measured": MEASURED_ON, "rate": f"{MEASURED_RATE:,}", "launch": LAUNCH_SECONDS * 1e6}
    facts |= {"memory": H100_BYTES / 1e12, "near": near, "far": far}
    lines = [HEADING, "", INTRODUCTION.format(**facts)]
    for step in steps:
        nbytes, sums = sizes[step.recipe]
        for cluster in CLUSTERS:
            reduction = reduction_seconds(cluster, nbytes, sums)
            alone = step.seconds(step.batch)
            rate = cluster.gpus * step.batch / (alone + reduction)
            cells = [
                f"{step.recipe}, {step.side} pixels",
                f"{step.batch:,}",
                f"{alone * 1e3:.2f} ({step.source})",
                str(cluster.gpus),
                f"{nbytes / 1e6:.1f}",
                f"{reduction * 1e3:.2f}",
                _rounded(rate),
                f"{efficiency(step, reduction):.0%}",
                _rounded(pays_from(step, cluster, reduction)),
                _rounded(half_from(step, cluster, reduction)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rounded(number: float) -> str:
    """To two digits: the latencies are assumed, and the links do not reach what is published."""
    return f"{float(f'{number:.2g}'):,.0f}"


def main() -> int:
    write_section(DOCUMENT, HEADING, text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
