"""``python -m rsengine.train``: train a ResNet-RS as a recipe says, and record the run in a folder."""

from __future__ import annotations

import argparse
import contextlib
import functools
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rsengine.config import Recipe, describe, load_recipe, recipe_names
from rsengine.data import Dataset, find_dataset
from rsengine.data.errors import UserError
from rsengine.data.paths import convert_command
from rsengine.device import choose_execution, keep_freed_memory
from rsengine.engine.compiler import check_compiler, compile_errors
from rsengine.engine.graph import explain_step
from rsengine.errors import run_command
from rsengine.kernels import explain
from rsengine.run.checkpoint import load_checkpoint
from rsengine.run.files import (
    BEST_FILE,
    CHECKPOINT_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
    remove_leftovers,
    write_atomically,
)
from rsengine.run.folder import RUNS, latest_run, locked, make_folder, make_run_folder
from rsengine.run.initial import Initial, normalised_as, origin_of, read_initial
from rsengine.run.progress import duration
from rsengine.run.records import write_records
from rsengine.trainer import Trainer

say = functools.partial(print, flush=True)  # a log file shows each line at once


class UsageError(UserError):
    """A command line that cannot be followed."""


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 1 diverged, 2 bad input, 130 or 143 stopped by a signal."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _train(arguments))


def _train(arguments: argparse.Namespace) -> int:
    if arguments.list_settings:
        print(describe())
        return 0
    with contextlib.ExitStack() as held:  # the run folder, from the moment it is known
        return _run(arguments, held)


def _run(arguments: argparse.Namespace, held: contextlib.ExitStack) -> int:
    initial = _initial(arguments)
    recipe = _recipe(arguments, "quickstart", initial)
    out = Path(arguments.out) if arguments.out else None
    if arguments.resume and out is None and arguments.recipe:
        out = latest_run(recipe.name)
    if out is not None and arguments.resume:
        _saved(arguments, out)  # once now, before data are converted in vain
    elif out is not None:
        _check_free(out)
    dataset = find_dataset(arguments.data, fallback_digits=arguments.or_digits, log=say)
    if dataset.image_size is None:
        raise UsageError(
            f"{dataset.folder}: its images differ in size; convert them again with --size N, for example "
            f"`{convert_command()} SOURCE --out DIR --size 32`"
        )
    if dataset.name == "digits" and arguments.recipe is None and not (arguments.resume and out):
        recipe = _recipe(arguments, "digits", initial)
        say("recipe digits, because the data are the digits and no --recipe was given")
    state, origin = None, initial.origin() if initial else None
    if arguments.resume:
        out = out or latest_run(recipe.name)
        held.enter_context(locked(out, say))
        state, recipe = _saved(arguments, out)
        origin = origin_of(state, out)
    dataset = normalised_as(dataset, origin)

    execution = choose_execution(arguments.device, recipe.train.precision)
    if execution.device.type == "cpu" and not keep_freed_memory():
        say("memory: without glibc, large blocks of memory are mapped again in each step, which takes time")
    if execution.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # a run has few shapes: each convolution's algorithm is found by trying
    graph, compile = not arguments.no_graph, arguments.compile
    if compile:
        check_compiler(execution)
    trainer = Trainer(recipe, dataset, execution, out or RUNS, origin=origin, graph=graph, compile=compile, say=say)
    if state is not None:
        trainer.restore(state)
    else:
        if initial is not None:
            trainer.start_from(initial)
        out = _begin(trainer, out, held)
    remove_leftovers(out)

    resume = shlex.join(["python", "-m", "rsengine.train", "--resume", "--out", str(out)])
    if arguments.data:
        resume += f" --data {shlex.quote(arguments.data)}"
    resume += " --no-graph" * arguments.no_graph + " --compile" * arguments.compile
    _announce(trainer, dataset, explain_step(execution, graph, compile))
    with compile_errors() if compile else contextlib.nullcontext():
        stopped = trainer.run()
    if stopped:  # printed first, and without an evaluation: whoever stops a run should not have to wait
        where = f"step {trainer.steps_done} of {trainer.total_steps}"
        say(f"stopped after {where}; everything is saved. Go on with: {resume}")
    elif not trainer.result:
        trainer.evaluate()  # the run had ended before it was resumed
    write_records(
        out,
        recipe=recipe,
        dataset=dataset,
        execution=execution,
        model=trainer.step.model,
        result=trainer.result,
        origin=trainer.origin,
    )
    if stopped:
        return 128 + stopped
    final = trainer.result.get("ema") or trainer.result["raw"]
    say(
        f"test accuracy {final.accuracy:.2%}{' (EMA)' if 'ema' in trainer.result else ''} on {dataset.name} after "
        f"{trainer.progress.epoch} epochs, {duration(trainer.progress.seconds)}. Report: {out / 'report.md'}"
    )
    return 0


def _announce(trainer: Trainer, dataset: Dataset, steps: str) -> None:
    recipe, execution = trainer.recipe, trainer.execution
    height, width = dataset.image_size
    counts = f"{dataset.train_count:,} train and {dataset.test_count:,} test images"
    say(f"data: {dataset.name}, {counts}, {height}x{width}; {trainer.batches.reason}")
    say(f"compute: {execution.reason}; channels_last; {execution.threads} threads; {steps}")
    if execution.device.type == "cpu":
        say(f"layers: {explain('batch_norm', 'cpu')}")
    say(f"run: {recipe.name}, {recipe.train.epochs} epochs of {trainer.steps_per_epoch} steps, into {trainer.out}")
    if recipe.train.frozen_parts:
        parts, trained = ", ".join(recipe.train.frozen_parts), sum(p.numel() for p in trainer.step.update.params)
        say(f"frozen: {parts}, with batch norm in evaluation mode; {trained:,} parameters are trained")
        if trainer.origin is None:
            say("frozen: these parts keep their random weights; --init begins with weights that were trained")
    if trainer.resumed:
        say(f"resumed at step {trainer.steps_done} of {trainer.total_steps}")


def _recipe(arguments: argparse.Namespace, default: str, initial: Initial | None) -> Recipe:
    """The recipe that the command line asks for; without ``--recipe``, with the network of the ``initial`` weights."""
    recipe = load_recipe(arguments.recipe or default)
    if initial is not None and not arguments.recipe:
        recipe = replace(recipe, model=initial.model)
    recipe = recipe.with_settings(_settings(arguments))
    if initial is not None:
        initial.check_architecture(recipe.model)
    return recipe


def _initial(arguments: argparse.Namespace) -> Initial | None:
    if not arguments.init:
        return None
    if arguments.resume:
        raise UsageError("--init: a run that is resumed has its weights already; leave out --init, or --resume")
    return read_initial(arguments.init)


def _settings(arguments: argparse.Namespace) -> list[str]:
    """``--set``, and the options that abbreviate one."""
    short = {"train.seed": arguments.seed, "train.epochs": arguments.epochs}
    short["train.limit_train_batches"] = arguments.limit_train_batches
    return [*arguments.set, *(f"{key}={value}" for key, value in short.items() if value is not None)]


def _saved(arguments: argparse.Namespace, out: Path) -> tuple[dict[str, Any], Recipe]:
    """The checkpoint in ``out`` and its recipe. The settings on the command line must agree with it."""
    state = load_checkpoint(out / CHECKPOINT_FILE)
    saved = Recipe.from_toml(state["recipe"], str(out / CHECKPOINT_FILE))
    asked = load_recipe(arguments.recipe) if arguments.recipe else saved
    differences = asked.with_settings(_settings(arguments)).differences(saved)
    if differences:
        raise UsageError(
            f"--resume: the run's recipe cannot change ({'; '.join(differences)}); leave "
            f"{'--recipe, which gives these, ' if arguments.recipe else 'these '}out or start anew"
        )
    return state, saved


def _check_free(out: Path) -> None:
    if (out / CHECKPOINT_FILE).exists():
        raise UsageError(f"--out {out}: holds a run already; add --resume to go on with it, or name another folder")
    for name in (BEST_FILE, WEIGHTS_FILE):  # of a run whose checkpoint is gone
        if (out / name).exists():
            raise UsageError(f"--out {out}: holds the {name} of an earlier run; name another folder")


def _begin(trainer: Trainer, out: Path | None, held: contextlib.ExitStack) -> Path:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rsengine.train", description=__doc__)
    parser.add_argument("--recipe", help=f"one of {', '.join(recipe_names())}, or a TOML file (default: quickstart)")
    parser.add_argument(
        "--data",
        help=f"a converted folder, any source for `{convert_command()}`, or digits (default: $RSENGINE_DATA, data/, "
        "download)",
    )
    parser.add_argument(
        "--or-digits", action="store_true", help="where no data are found, train on scikit-learn's digits"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one recipe setting"
    )
    parser.add_argument("--list-settings", action="store_true", help="print every setting with its default, and exit")
    parser.add_argument("--out", help="run folder (default: runs/RECIPE-TIME)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, or with the recipe's latest"
    )
    parser.add_argument(
        "--init",
        metavar="WEIGHTS",
        help="begin with the weights of a run, or of timm: a run folder or its weights.safetensors, a folder with "
        "model.safetensors, or a .pth of a resnetrs*; without --recipe their network is taken too",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--no-graph", action="store_true", help="on a GPU, run steps plainly, without capturing them as CUDA graphs"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the network with torch.compile; the first step takes minutes"
    )
    parser.add_argument("--seed", type=int, help="short for --set train.seed=N")
    parser.add_argument("--epochs", type=int, help="short for --set train.epochs=N")
    parser.add_argument(
        "--limit-train-batches", type=int, metavar="N", help="short for --set train.limit_train_batches=N"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
