"""Two GPUs that share batches through NCCL: captured steps, with their all-reduce in the graph, against plain ones, and
images/s of one GPU and of two."""

from __future__ import annotations

import dataclasses
import gc
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from rsengine.checks.gpu.device import SIZE, Setup, time_in_turn
from rsengine.checks.gpu.equality import exact_convolutions, tensor_differences
from rsengine.checks.gpu.parent import die_with
from rsengine.checks.gpu.steps import CLASSES, MEAN, STD, STEPS_PER_EPOCH, device_batches, execution_on
from rsengine.config import Recipe
from rsengine.engine.build import build_step
from rsengine.engine.graph import CapturedStep, static_batch
from rsengine.engine.step import TrainStep
from rsengine.input.transfer import Batch
from rsengine.parallel.ranks import ALONE, Ranks, join

PROCESSES, STEPS = 2, 20


def measure(row: str, setup: Setup) -> dict[str, Any]:
    if gpu_count() < PROCESSES:
        return {"left_out": "one GPU", "wrong": []}
    return summary(in_processes(_member, setup))


def gpu_count() -> int:
    return torch.cuda.device_count()


def in_processes(function: Callable[[Ranks, Setup], Any], setup: Setup) -> list[Any]:
    """``function(ranks, setup)`` of each of two processes that are one group, by rank.

    Raises:
        RuntimeError: what a process raised first, in a line.
    """
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent holds one
    answers = context.SimpleQueue()
    arguments = store.port, os.getpid(), function, dataclasses.replace(setup, log=print), answers
    try:
        multiprocessing.spawn(_run, arguments, PROCESSES)
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        raise RuntimeError(f"process {error.error_index}: {str(error).strip().splitlines()[-1]}") from error
    return [answer for _, answer in sorted((answers.get() for _ in range(PROCESSES)), key=lambda pair: pair[0])]


def _run(rank: int, port: int, parent: int, function: Callable, setup: Setup, answers: Any) -> None:
    die_with(parent)
    place, count = str(rank), str(PROCESSES)
    os.environ |= {"RANK": place, "LOCAL_RANK": place, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = join(setup.device.device.type)
    answers.put((rank, function(ranks, setup)))
    gc.collect()  # of the captured graphs, which must be gone before the group is
    ranks.leave()


def _member(ranks: Ranks, setup: Setup) -> dict[str, Any]:
    return equality(ranks, setup) | images(ranks, setup)


def equality(ranks: Ranks, setup: Setup) -> dict[str, Any]:
    """Of some captured and plain steps, in float32: what differs, here and between the processes."""
    recipe = setup.recipe()
    plain, captured = (_step(recipe, setup, ranks, bf16=False) for _ in range(2))
    batches = [_part(batch, ranks) for batch in device_batches(recipe, setup.device)]
    with exact_convolutions():
        call = _captured(captured, recipe, setup)
        for number in range(STEPS):
            for run in (plain, call):
                run(*batches[number % len(batches)])
    norms, first = (_norms(step) for step in (captured, _step(recipe, setup, ranks, bf16=False)))
    return {
        "backend": ranks.backend,
        "mbytes": plain.update.reduction.nbytes / 1e6,
        "difference": max(relative for _, relative in tensor_differences(plain, captured)),
        "moved": norms != first,
        "same_in_all": ranks.all_of(norms) == [norms] * ranks.size,
    }


def images(ranks: Ranks, setup: Setup) -> dict[str, Any]:
    """Seconds of captured steps in bfloat16: on each GPU alone, and on both with a batch of twice the size."""
    recipe = setup.recipe()
    batch = recipe.train.batch_size
    double = recipe.with_settings([f"train.batch_size={ranks.size * batch}"])
    runs = {"alone": _ready(recipe, setup, ALONE), "together": _ready(double, setup, ranks)}
    times = time_in_turn(setup.device, runs, setup.rounds, setup.round_steps)
    return {"batch_size": batch} | {name: statistics.median(each for each, _ in found) for name, found in times.items()}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of both processes. A step takes as long as the slower one."""
    first = found[0]
    alone, together = (max(each[name] for each in found) for name in ("alone", "together"))
    difference, batch = max(each["difference"] for each in found), first["batch_size"]
    wrong = [] if difference == 0 else [f"captured and plain steps differ by {difference:.2g}, relative"]
    wrong += [] if all(each["same_in_all"] for each in found) else ["the processes have different weights"]
    wrong += [] if all(each["moved"] for each in found) else ["no weight has changed"]
    return {
        "steps": STEPS,
        "backend": first["backend"],
        "all_reduce_mbytes": first["mbytes"],
        "difference": difference,
        "batch_size": batch,
        "images_per_second": batch / alone,
        "images_per_second_together": len(found) * batch / together,
        "efficiency": alone / together,
        "wrong": wrong,
    }


def _step(recipe: Recipe, setup: Setup, ranks: Ranks, *, bf16: bool) -> TrainStep:
    torch.manual_seed(recipe.train.seed)
    return build_step(recipe, CLASSES, MEAN, STD, execution_on(setup.device, bf16), STEPS_PER_EPOCH, ranks=ranks)


def _norms(step: TrainStep) -> list[float]:
    """The length of each weight: equal in two processes where their bits are, and hardly by chance."""
    return [float(p.detach().double().norm()) for p in step.update.params]


def _captured(step: TrainStep, recipe: Recipe, setup: Setup) -> CapturedStep:
    inputs = static_batch(recipe.train.batch_size // step.ranks.size, SIZE, setup.device.device)
    return CapturedStep(step, inputs, setup.device.recorder())


def _ready(recipe: Recipe, setup: Setup, ranks: Ranks) -> Callable[[], None]:
    """A captured step on one batch, after three calls to warm up."""
    call = _captured(_step(recipe, setup, ranks, bf16=True), recipe, setup)
    inputs = _part(device_batches(recipe, setup.device, 1)[0], ranks)
    for _ in range(3):
        call(*inputs)
    return lambda: call(*inputs)


def _part(batch: Batch, ranks: Ranks) -> Batch:
    images, labels = batch
    return ranks.part(images).contiguous(), ranks.part(labels).contiguous()
