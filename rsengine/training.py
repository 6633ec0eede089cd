"""A run from what is asked for to its records: what the command ``rsengine train`` and :func:`rsengine.train` share."""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rsengine.config import Recipe, load_recipe
from rsengine.data import Dataset, find_dataset
from rsengine.data.errors import UserError
from rsengine.data.find import named_by_environment, variable_of
from rsengine.data.paths import convert_command
from rsengine.device import Execution, choose_execution, keep_freed_memory
from rsengine.engine.build import explain_layers
from rsengine.engine.compiler import check_compiler, compile_errors
from rsengine.engine.evaluation import Evaluation
from rsengine.engine.graph import explain_step
from rsengine.output import counted, program, speaker
from rsengine.parallel.launch import bind_to_cores, end_with_launcher
from rsengine.parallel.ranks import ALONE, Ranks, join
from rsengine.processor import is_busy
from rsengine.run.checkpoint import load_checkpoint
from rsengine.run.files import (
    BEST_FILE,
    CHECKPOINT_FILE,
    PAGE_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    WEIGHTS_FILE,
    remove_leftovers,
    write_atomically,
)
from rsengine.run.folder import RUNS, latest_run, locked, make_folder, make_run_folder
from rsengine.run.initial import Initial, normalised_as, origin_of, read_initial
from rsengine.run.progress import duration
from rsengine.run.records import write_records
from rsengine.run.same_data import data_of
from rsengine.track import check_trackers, open_tracking
from rsengine.trainer import Trainer
from rsengine.waiting import beside_others

say_aloud = speaker(quiet=False, json=False)


class UsageError(UserError):
    """A request that cannot be followed."""


@dataclass(frozen=True)
class Request:
    """What is asked of a run. The fields are the options of ``rsengine train``, which says what they do.

    Attributes:
        recipe: a name, the path of a TOML file, or a recipe; None leaves the choice to the data and ``init``.
        set: ``section.key=value`` texts, or values by ``section.key``.
        graph, compile: as :class:`rsengine.trainer.Trainer` takes them.
        bar: show the progress as a bar; None: on a terminal and in a notebook.
        started: when the run was asked for, in seconds of :func:`time.time`; None: when the process began.
    """

    recipe: str | Recipe | None = None
    data: str | None = None
    set: Sequence[str] | Mapping[str, Any] = ()
    out: Path | None = None
    resume: bool = False
    init: str | None = None
    or_digits: bool = False
    device: str = "auto"
    graph: bool = True
    compile: bool = False
    track: Sequence[str] = ()
    bar: bool | None = None
    started: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        stopped: the number of the signal that stopped it early, or 0.
        result: of the last evaluation in this process, by weights (``raw``, ``ema``); empty without one.
        epochs: done, over all processes that worked on the run.
        seconds: of training and evaluation, over all of them.
    """

    folder: Path
    recipe: Recipe
    dataset: Dataset
    stopped: int
    result: dict[str, Evaluation]
    epochs: int
    seconds: float

    @property
    def weights(self) -> str:
        """Which weights the result is of: ``ema``, or ``raw`` where the run keeps no EMA."""
        return "ema" if self.recipe.ema.enabled else "raw"

    def line(self) -> str:
        """The result in one line, and where to read about it."""
        page, plain = self.folder / PAGE_FILE, self.folder / REPORT_FILE
        accuracy = self.result[self.weights].accuracy
        return (
            f"test accuracy {accuracy:.2%}{' (EMA)' if self.weights == 'ema' else ''} on {self.dataset.name} after "
            f"{counted(self.epochs, 'epoch')}, {duration(self.seconds)}. Report: {page if page.exists() else plain}"
        )

    def summary(self) -> dict[str, Any]:
        """The outcome in values that JSON holds. Accuracies are fractions; without an evaluation they are None."""
        final = self.result.get(self.weights)
        return {
            "run": str(self.folder),
            "recipe": self.recipe.name,
            "dataset": self.dataset.name,
            "weights": self.weights,
            "test_accuracy": final.accuracy if final else None,
            "test_loss": final.loss if final else None,
            "calibration": final.calibration if final else None,
            "epochs": self.epochs,
            "planned_epochs": self.recipe.train.epochs,
            "seconds": self.seconds,
            "stopped_by_signal": self.stopped or None,
        }


def train(request: Request, say: Callable[[str], None] = say_aloud) -> Outcome:
    """Train, evaluate and record. Ctrl-C and SIGTERM end the run after the step under way, with everything saved.

    Args:
        say: called with each line for the user.

    Raises:
        UserError: what cannot be done, in one line with the remedy.
    """
    end_with_launcher()
    bind_to_cores()
    ranks = join(request.device)
    if not ranks.is_main:
        request, say = replace(request, track=(), bar=False), speaker(quiet=True, json=False)
    with contextlib.ExitStack() as held:  # the run folder, from the moment it is known
        outcome = ranks.run(lambda: _train(request, say, held, ranks))
    if not outcome.stopped:
        say(outcome.line())
    ranks.leave()  # not after an error: it would wait for processes that have ended
    return outcome


def _train(request: Request, say: Callable[[str], None], held: contextlib.ExitStack, ranks: Ranks) -> Outcome:
    check_trackers(request.track)
    request = _after_restart(request, ranks, say)
    initial = initial_of(request)
    recipe = recipe_of(request, "quickstart", initial)
    out, recorded = request.out, None
    if ranks.is_main:
        if request.resume and out is None and request.recipe:
            out = latest_run(recipe.name)
        if out is not None and request.resume:
            recorded, _ = _saved(request, out)  # once now, before data are converted in vain
        elif out is not None:
            _check_free(out)
    out, recorded = ranks.from_main((out, recorded and {"dataset": recorded["dataset"]}))
    with ranks.in_turn():
        dataset = _data_again(request, recorded, out, say) if recorded else None
        dataset = of_one_size(dataset or find_dataset(request.data, fallback_digits=request.or_digits, log=say))
    if not (request.resume and out):
        recipe = recipe_for(request, dataset, recipe, initial, say)
    state, origin = None, initial.origin() if initial else None
    if request.resume:
        if ranks.is_main:
            out = out or latest_run(recipe.name)
            held.enter_context(locked(out, say))
            state, recipe = _saved(request, out)
        out, state, recipe = ranks.from_main((out, state, recipe))
        origin = origin_of(state, out)
    dataset = normalised_as(dataset, origin)

    execution = execution_of(request, recipe, say)
    trainer = Trainer(
        recipe,
        dataset,
        execution,
        out or RUNS,
        origin=origin,
        graph=request.graph,
        compile=request.compile,
        say=say,
        bar=request.bar,
        started=request.started,
        ranks=ranks,
    )
    if state is not None:
        trainer.restore(state, variable_of(request.data))
    elif initial is not None:
        trainer.start_from(initial)
    if ranks.is_main:
        if state is None:
            out = _begin(trainer, out, held, say)
        ranks.remember("folder", str(out))
        remove_leftovers(out)
    out = ranks.from_main(out)
    trainer.set_folder(out)
    tracking = open_tracking(request.track, out, recipe, dataset, trainer.steps_done, say)
    held.callback(tracking.close)
    trainer.watch = tracking.record

    resume = resume_command(request, out, ranks)
    announce(trainer, dataset, request, say)
    threads = execution.threads if execution.device.type == "cpu" else 1
    compiling = contextlib.nullcontext()
    if request.compile:
        compiling = compile_errors(lambda: trainer.stop.signal == signal.SIGINT)
    with compiling, beside_others(threads):
        stopped = trainer.run()
    if stopped:  # printed first, and without an evaluation: whoever stops a run should not have to wait
        where = f"step {trainer.steps_done} of {trainer.total_steps}"
        say(f"stopped after {where}; everything is saved. Go on with: {resume}")
    elif not trainer.result:
        trainer.evaluate()  # the run had ended before it was resumed
    if ranks.is_main:
        write_records(
            out,
            recipe=recipe,
            dataset=dataset,
            execution=execution,
            model=trainer.step.model,
            result=trainer.result,
            say=say,
            origin=trainer.origin,
        )
    ranks.most(0)  # none leaves before the records are there: what ends early, gloo or an agent may take for a failure
    outcome = Outcome(out, recipe, dataset, stopped, trainer.result, trainer.progress.epoch, trainer.progress.seconds)
    tracking.finish(outcome.summary(), trainer)
    return outcome


def _after_restart(request: Request, ranks: Ranks, say: Callable[[str], None]) -> Request:
    """``request``, or where torchrun's agent has started the processes again, one that goes on with their run."""
    if not ranks.attempt:
        return request
    folder = ranks.remembered("folder") if request.out is None else str(request.out)
    saved = ranks.from_main(folder is not None and (Path(folder) / CHECKPOINT_FILE).is_file())
    where = f"with the checkpoint in {folder}" if saved else "anew, because there is no checkpoint yet"
    if not saved and request.resume:  # of the latest run, which no attempt has come to
        return request
    say(f"started again by torchrun, attempt {ranks.attempt + 1}: the run goes on {where}")
    return replace(request, out=Path(folder) if folder else None, resume=saved, init=None if saved else request.init)


def resume_command(request: Request, out: Path, ranks: Ranks = ALONE) -> str:
    """The command that goes on with the run in ``out``, in as many processes; on several machines with the user's
    OPTIONS of torchrun."""
    start = program("train").split()
    if ranks.size > 1 and not ranks.launched:
        alone = ranks.size == ranks.local_size
        start = ["torchrun", f"--nproc-per-node={ranks.size}" if alone else "OPTIONS", "-m", "rsengine.train"]
    command = [*start, "--resume", "--out", str(out)]
    command += [f"--processes={ranks.size}"] * ranks.launched
    command += ["--data", str(request.data)] if request.data else []
    command += ["--no-graph"] * (not request.graph) + ["--compile"] * request.compile
    return shlex.join([*command, *(f"--track={name}" for name in request.track)])


# --- from the request to what it means --------------------------------------------------------------------------------


def initial_of(request: Request) -> Initial | None:
    """The weights that ``init`` names."""
    if not request.init:
        return None
    if request.resume:
        raise UsageError("--init: a run that is resumed has its weights already; leave out --init, or --resume")
    return read_initial(request.init)


def recipe_of(request: Request, default: str, initial: Initial | None) -> Recipe:
    """The recipe that is asked for; where none is, ``default`` with the network of the ``initial`` weights."""
    recipe = _named(request.recipe or default)
    if initial is not None and not request.recipe:
        recipe = replace(recipe, model=initial.model)
    recipe = _changed(recipe, request.set)
    if initial is not None:
        initial.check_architecture(recipe.model)
    return recipe


def recipe_for(
    request: Request, dataset: Dataset, recipe: Recipe, initial: Initial | None, say: Callable[[str], None]
) -> Recipe:
    """``recipe``, or the one for digits where the data are these and none is asked for."""
    if dataset.name != "digits" or request.recipe is not None:
        return recipe
    say("recipe digits, because the data are the digits and no --recipe was given")
    return recipe_of(request, "digits", initial)


def of_one_size(dataset: Dataset) -> Dataset:
    """``dataset``. Raises :class:`UsageError` where its images differ in size."""
    if dataset.image_size is None:
        raise UsageError(
            f"{dataset.folder}: its images differ in size; convert them again with --size N, for example "
            f"`{convert_command()} SOURCE --out DIR --size 32`"
        )
    return dataset


def execution_of(request: Request, recipe: Recipe, say: Callable[[str], None]) -> Execution:
    """Where the run computes, with the process set up for it."""
    execution = choose_execution(request.device, recipe.train.precision)
    if execution.device.type == "cpu" and not keep_freed_memory():
        say("memory: without glibc, large blocks of memory are mapped again in each step, which takes time")
    if execution.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # a run has few shapes: each convolution's algorithm is found by trying
    if request.compile:
        check_compiler(execution)
    return execution


def announce(trainer: Trainer, dataset: Dataset, request: Request, say: Callable[[str], None]) -> None:
    """Say what will be done, how, and why."""
    recipe, execution = trainer.recipe, trainer.execution
    steps = explain_step(execution, request.graph, request.compile)
    height, width = dataset.image_size
    counts = f"{dataset.train_count:,} train and {counted(dataset.test_count, 'test image')}"
    say(f"data: {dataset.name}, {counts}, {height}x{width}; {trainer.batches.reason}")
    ranks, threads = trainer.ranks, counted(execution.threads, "thread")
    if ranks.size > 1:
        rule = recipe.train.batch_norm
        way = ranks.backend + " and shared memory" * trainer.step.update.reduction.is_shared
        threads = f"{ranks.size} processes through {way}, {threads} each, batch norm {rule}"
    alone = execution.device.type == "cpu" and ranks.size == 1  # other processes of this run are no other work
    busy = is_busy(execution.threads) if alone else ""
    say(f"compute: {execution.reason}; channels_last; {threads}; {steps}" + f"; {busy}" * bool(busy))
    if execution.device.type == "cpu":
        say(f"layers: {'; '.join(explain_layers(recipe, execution, request.compile, ranks.size))}")
    length = f"{counted(recipe.train.epochs, 'epoch')} of {counted(trainer.steps_per_epoch, 'step')}"
    say(f"run: {recipe.name}, {length}, into {trainer.out}")
    if recipe.train.frozen_parts:
        parts, trained = ", ".join(recipe.train.frozen_parts), sum(p.numel() for p in trainer.step.update.params)
        say(f"frozen: {parts}, with batch norm in evaluation mode; {counted(trained, 'parameter')} trained")
        if trainer.origin is None:
            say("frozen: these parts keep their random weights; --init begins with weights that were trained")
    if trainer.resumed:
        say(f"resumed at step {trainer.steps_done} of {trainer.total_steps}")


def _named(recipe: str | Recipe) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _changed(recipe: Recipe, changes: Sequence[str] | Mapping[str, Any]) -> Recipe:
    if not isinstance(changes, Mapping):
        return recipe.with_settings([changes] if isinstance(changes, str) else changes)
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        section, _, name = str(key).rpartition(".")
        place = nested.setdefault(section, {}) if section else nested
        place[name] = value
    return recipe.with_values(nested)


# --- the run folder ---------------------------------------------------------------------------------------------------


def _saved(request: Request, out: Path) -> tuple[dict[str, Any], Recipe]:
    """The checkpoint in ``out`` and its recipe. The settings that are asked for must agree with it."""
    state = load_checkpoint(out / CHECKPOINT_FILE)
    saved = Recipe.from_toml(state["recipe"], str(out / CHECKPOINT_FILE))
    asked = _named(request.recipe) if request.recipe else saved
    differences = _changed(asked, request.set).differences(saved)
    if differences:
        raise UsageError(
            f"--resume: the run's recipe cannot change ({'; '.join(differences)}); leave "
            f"{'--recipe, which gives these, ' if request.recipe else 'these '}out or start anew"
        )
    return state, saved


def _data_again(request: Request, state: dict[str, Any], out: Path, say: Callable[[str], None]) -> Dataset | None:
    """The data that the run in ``out`` began with, unless others are named, or an older run does not say where."""
    if request.data is not None or named_by_environment():
        return None
    dataset = data_of(state, out)
    if dataset is not None:
        say(f"data: {dataset.name} in {dataset.folder}, which the run began with")
    return dataset


def _check_free(out: Path) -> None:
    if (out / CHECKPOINT_FILE).exists():
        raise UsageError(f"--out {out}: holds a run already; add --resume to go on with it, or name another folder")
    for name in (BEST_FILE, WEIGHTS_FILE):  # of a run whose checkpoint is gone
        if (out / name).exists():
            raise UsageError(f"--out {out}: holds the {name} of an earlier run; name another folder")


def _begin(trainer: Trainer, out: Path | None, held: contextlib.ExitStack, say: Callable[[str], None]) -> Path:
    """Make and hold the folder of a new run, now that nothing refuses it any more."""
    if out is None:
        out = make_run_folder(trainer.recipe.name)
    make_folder(out)
    held.enter_context(locked(out, say))
    _check_free(out)  # another process may have had it meanwhile
    trainer.set_folder(out)
    trainer.log.truncate_after(-1)  # records of a run that was killed before its first checkpoint
    write_atomically(out / RECIPE_FILE, trainer.recipe.to_toml().encode())
    return out
