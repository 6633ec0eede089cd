"""What a run would do and about how long it would take: ``rsengine train --dry-run``."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rsengine.config import Recipe
from rsengine.data import Dataset, convert, find_dataset
from rsengine.data.find import NotConverted
from rsengine.data.sources.open import DIGITS
from rsengine.device import Execution
from rsengine.engine.build import explain_layers
from rsengine.engine.graph import explain_step
from rsengine.kernels import explain
from rsengine.output import counted
from rsengine.run.folder import RUNS
from rsengine.run.initial import Initial, normalised_as
from rsengine.run.progress import duration
from rsengine.temporaries import temporary_folder
from rsengine.track import check_trackers
from rsengine.trainer import Trainer
from rsengine.training import Request, UsageError, execution_of, initial_of, of_one_size, recipe_for, recipe_of

WARM_UP, MOST_STEPS, MOST_SECONDS = 3, 8, 5.0  # steps that are not timed; the longest that is measured
KERNELS = ("squeeze_excite_residual", "label_smoothed_cross_entropy", "sgd_ema_step")


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        data: the data set in a line, or what would have to be done before it is known.
        loader, steps, seconds, measured: None where the data are not there yet. ``steps``: in an epoch. ``seconds``: of
            the whole run, evaluation included. ``measured``: how the prediction was made.
        kernels: which implementation of each operation runs, and why.
    """

    recipe: Recipe
    data: str
    device: str
    kernels: list[str]
    loader: str | None = None
    steps: int | None = None
    seconds: float | None = None
    measured: str | None = None

    def summary(self) -> dict[str, Any]:
        """The plan in values that JSON holds."""
        return {
            "recipe": self.recipe.flat(),
            "data": self.data,
            "device": self.device,
            "loader": self.loader,
            "kernels": self.kernels,
            "epochs": self.recipe.train.epochs,
            "steps_per_epoch": self.steps,
            "predicted_seconds": self.seconds,
            "measured": self.measured,
        }

    def text(self) -> str:
        """The plan for people."""
        unknown = "known once the data are converted"
        lines = [self.recipe.to_toml().rstrip(), "", f"data: {self.data}", f"device: {self.device}"]
        lines += [f"loader: {self.loader or unknown}", *(f"kernel: {line}" for line in self.kernels)]
        if self.seconds is None:
            return "\n".join([*lines, f"time: {unknown}"])
        run = f"{counted(self.recipe.train.epochs, 'epoch')} of {counted(self.steps, 'step')}"
        return "\n".join([*lines, f"time: about {duration(self.seconds)} for {run} ({self.measured})"])


def plan(request: Request, say: Callable[[str], None]) -> Plan:
    """Plan the run that ``request`` asks for. Nothing is written but compiled code in the cache folder.

    A data set that is not converted yet is not converted, except for the digits, into a temporary folder. Of a run on
    converted data, a few steps are taken, and timed.

    Raises:
        UserError: what a run would be refused for.
    """
    if request.resume:
        raise UsageError("--dry-run: says what a new run would do; leave out --resume, or --dry-run")
    check_trackers(request.track)
    initial = initial_of(request)
    recipe = recipe_of(request, "quickstart", initial)
    with contextlib.ExitStack() as held:
        try:
            dataset = find_dataset(request.data, fallback_digits=request.or_digits, conversion=False, log=say)
        except NotConverted as error:
            if error.source != DIGITS:
                execution = execution_of(request, recipe, say)
                return Plan(recipe, str(error), _device(request, execution), _kernels(request, recipe, execution))
            folder = held.enter_context(temporary_folder("dry-run"))
            dataset = convert(DIGITS, Path(folder) / DIGITS, log=lambda _line: None)
        dataset = of_one_size(dataset)
        recipe = recipe_for(request, dataset, recipe, initial, say)
        return _measured(request, recipe, dataset, execution_of(request, recipe, say), initial, say)


def _measured(
    request: Request,
    recipe: Recipe,
    dataset: Dataset,
    execution: Execution,
    initial: Initial | None,
    say: Callable[[str], None],
) -> Plan:
    origin = initial.origin() if initial else None
    dataset = normalised_as(dataset, origin)
    trainer = Trainer(recipe, dataset, execution, RUNS, origin=origin, say=say)
    if initial is not None:
        trainer.start_from(initial)
    step_seconds, image_seconds, steps = _timed(trainer)
    height, width = dataset.image_size
    work = sum(size[0] * size[1] / (height * width) if size else 1.0 for size in trainer.image_sizes)
    evaluations = -(-recipe.train.epochs // recipe.train.evaluate_every)
    seconds = work * trainer.steps_per_epoch * step_seconds + evaluations * dataset.test_count * image_seconds
    counts = f"{dataset.train_count:,} train and {counted(dataset.test_count, 'test image')}"
    plain = ", not compiled" * request.compile + ", outside a CUDA graph" * (execution.device.type == "cuda")
    return Plan(
        recipe,
        f"{dataset.name}, {counts}, {height}x{width}, {counted(len(dataset.classes), 'class', 'classes')}",
        _device(request, execution),
        _kernels(request, recipe, execution),
        trainer.batches.reason,
        trainer.steps_per_epoch,
        seconds,
        f"predicted from {counted(steps, 'step')} of {1000 * step_seconds:.1f} ms here, now{plain}",
    )


def _timed(trainer: Trainer) -> tuple[float, float, int]:
    """Seconds of a training step and of evaluating an image, with their loader; and the number of steps timed."""
    steps = min(trainer.steps_per_epoch, WARM_UP + MOST_STEPS)
    warm_up = min(WARM_UP, steps - 1)
    timed, spent = 0, 0.0
    with contextlib.closing(trainer.batches.train_epoch(0, 0)) as batches:
        for number, inputs in enumerate(itertools.islice(batches, steps)):
            if number == warm_up:
                started = _now(trainer)
            trainer.step(*inputs)
            if number >= warm_up:
                timed, spent = timed + 1, _now(trainer) - started
            if spent > MOST_SECONDS:
                break
    batches, image_seconds = iter(trainer.batches.test_epoch()), 0.0
    try:
        for count in (1, 2):  # the first is a warm-up, and counts where there is no other
            started = _now(trainer)
            result = trainer.evaluation.measure(itertools.islice(batches, count))
            if images := next(iter(result.values())).images:
                image_seconds = (_now(trainer) - started) / images
    finally:
        if hasattr(batches, "close"):  # of a stream, which holds threads
            batches.close()
    return spent / timed, image_seconds, timed


def _now(trainer: Trainer) -> float:
    if trainer.execution.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _device(request: Request, execution: Execution) -> str:
    steps = explain_step(execution, request.graph, request.compile)
    return f"{execution.reason}; {counted(execution.threads, 'thread')}; {steps}"


def _kernels(request: Request, recipe: Recipe, execution: Execution) -> list[str]:
    kind = execution.device.type
    layers = explain_layers(recipe, execution, request.compile) if kind == "cpu" else [explain("batch_norm", kind)]
    return layers + [explain(op, kind) for op in KERNELS]
