"""``python -m rsengine.train``: train a ResNet-RS as a recipe says, and record the run in a folder."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rsengine.api import callable_as_train
from rsengine.config import describe, recipe_names, with_short
from rsengine.data.paths import convert_command
from rsengine.errors import SettingsError, run_command
from rsengine.output import add_output_options, parsed, print_json, print_result, program, speaker
from rsengine.parallel.launch import end_process, is_launched, launch, only_main_prints, processes, status_of_stop
from rsengine.plan import plan
from rsengine.track import TRACKERS
from rsengine.training import Request, train

EXAMPLE = "example: %(prog)s --data digits --set train.epochs=5 --out runs/first"


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 1 diverged, 2 bad input, 130 or 143 stopped by a signal."""
    argv = sys.argv[1:] if argv is None else argv
    with only_main_prints(errors=True):
        arguments = parsed(_parser(), argv)
        if status := run_command(lambda: _check(arguments)):
            return status
    alone = arguments.dry_run or arguments.list_settings
    if arguments.processes is not None and not alone and not is_launched():
        return run_command(lambda: launch(arguments.processes, argv))
    with only_main_prints():
        return run_command(lambda: _train(arguments))


def _check(arguments: argparse.Namespace) -> int:
    """Refuse what every process of the run would refuse. Returns 0."""
    _request(arguments)
    if arguments.processes is not None and "RANK" in os.environ and not is_launched():
        raise SettingsError("--processes: torchrun has started several processes already; leave it out")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    if arguments.list_settings:
        print_result(describe())
        return 0
    say, request = speaker(quiet=arguments.quiet, json=arguments.json), _request(arguments)
    if arguments.dry_run:
        if os.environ.get("RANK", "0") != "0":
            return 0
        if arguments.processes is not None or "RANK" in os.environ:
            say("processes: the plan is that of one process, which takes the whole of each batch")
        planned = plan(request, say)
        print_json(planned.summary()) if arguments.json else print_result(planned.text())
        return 0
    outcome = train(request, say)
    if arguments.json:
        print_json(outcome.summary())
    return status_of_stop(outcome.stopped) if outcome.stopped else 0


def _request(arguments: argparse.Namespace) -> Request:
    short = {
        "--seed": ("train.seed", arguments.seed),
        "--epochs": ("train.epochs", arguments.epochs),
        "--limit-train-batches": ("train.limit_train_batches", arguments.limit_train_batches),
    }
    return Request(
        recipe=arguments.recipe,
        data=arguments.data,
        set=with_short(arguments.set, short),
        out=Path(arguments.out) if arguments.out else None,
        resume=arguments.resume,
        init=arguments.init,
        or_digits=arguments.or_digits,
        device=arguments.device,
        graph=not arguments.no_graph,
        compile=arguments.compile,
        track=arguments.track,
        bar=False if arguments.quiet else None,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("train"), description="Train a ResNet-RS as a recipe says, and record the run.", epilog=EXAMPLE
    )
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
        "--resume",
        action="store_true",
        help="go on with the run in --out, or with the recipe's latest; its data, where nothing names others",
    )
    parser.add_argument(
        "--init",
        metavar="WEIGHTS",
        help="begin with the weights of a run, or of timm: a run folder or its weights.safetensors, a folder with "
        "model.safetensors, or a .pth of a resnetrs*; without --recipe their network is taken too",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--processes",
        type=processes,
        metavar="N",
        help="train in N processes of this machine that share each batch, or as many as are fastest: auto",
    )
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
    parser.add_argument(
        "--track",
        action="append",
        default=[],
        choices=TRACKERS,
        help="show the run there too; may be given several times",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what a run would do and how long it may take; write nothing"
    )
    add_output_options(parser, result="the result")
    return parser


callable_as_train(__name__)


if __name__ == "__main__":
    end_process(main)
