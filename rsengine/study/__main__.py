"""``python -m rsengine.study NAME|FILE.toml``: train the trials of a study, and say what they show."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rsengine.config import Recipe
from rsengine.data import Dataset, find_dataset
from rsengine.data.find import NotConverted
from rsengine.errors import run_command
from rsengine.output import add_output_options, counted, escaped, program, speaker
from rsengine.run.files import remove_leftovers
from rsengine.run.folder import RUNS, locked, make_folder
from rsengine.run.formats import NO_SPREAD
from rsengine.run.progress import duration
from rsengine.study.budget import planned
from rsengine.study.file import Changes, Study, StudyError, load_study, study_names
from rsengine.study.manifest import Manifest, open_manifest, source_version
from rsengine.study.measure import Measurement
from rsengine.study.page import write_page
from rsengine.study.pictures import CURVES_FILE, INTERVALS_FILE, draw_curves, draw_intervals
from rsengine.study.progress import Progress
from rsengine.study.ray_place import connect
from rsengine.study.results import PAGE_FILE, VariantResult, as_json, gather, write_csv, write_json
from rsengine.study.runner import Place, run_trials
from rsengine.study.tables import write_markdown
from rsengine.study.workers import Worker, share_out

EXAMPLE = (
    "example: %(prog)s label-smoothing --data digits --model digits --seeds 2 --epochs 5 "
    "--set train.batch_size=64 --set schedule.learning_rate=0.1 (a minute long)"
)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 1 trials failed, 2 bad input, 130 or 143 stopped by a signal."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    say = speaker(quiet=arguments.quiet, json=arguments.json)
    study = load_study(arguments.study, _changes(arguments))
    workers = [Worker()] if arguments.on is not None else share_out(arguments.workers, arguments.device)
    if arguments.dry_run:
        _announce(study, arguments, workers, say)
        return 0
    folder = Path(arguments.out) if arguments.out else RUNS / f"study-{study.name}"
    dataset = find_dataset(study.data, log=say)
    if arguments.on is not None:
        folder = folder.absolute()  # other nodes have other working directories
    make_folder(folder)
    with contextlib.ExitStack() as held:
        held.enter_context(locked(folder, say))
        remove_leftovers(folder)

        def plan() -> dict[str, Recipe]:
            return _planned(
                study, dataset, workers, Measurement(str(dataset.folder), arguments.device, workers[0], say)
            )

        manifest = open_manifest(folder, study, dataset, plan, accept_code=arguments.accept_code, say=say)
        trials = manifest.trials(folder)
        say(f"study: {manifest.study.name}, {len(trials)} trials on {dataset.name}, into {escaped(folder)}")
        places: list[Place] = list(workers)
        if arguments.on is not None:
            places = connect(arguments.on, arguments.workers, arguments.device, say)
        progress = Progress(trials, len(places), say, quiet=arguments.quiet)
        stopped = run_trials(trials, dataset.folder, arguments.device, places, source_version(), progress)
        results = gather(manifest, folder)
        write_results(folder, manifest, results)
    if arguments.json:
        print(json.dumps(as_json(manifest, results)))
    if stopped:
        say(f"study: stopped by {signal.Signals(stopped).name}, and saved; the same command goes on with it")
        return 128 + stopped
    for each in results:
        say(_line(each))
    failed = sum(len(each.failed) for each in results)
    say(f"study: {len(trials) - failed} of {len(trials)} trials are done. Results: {escaped(folder / PAGE_FILE)}")
    return 1 if failed else 0


def write_results(folder: Path, manifest: Manifest, results: Sequence[VariantResult]) -> None:
    """Write the tables, the pictures and the page of a study into its folder."""
    write_csv(folder, manifest, results)
    write_json(folder, manifest, results)
    if any(each.summary for each in results):
        draw_curves(results, folder / CURVES_FILE)
        draw_intervals(results, folder / INTERVALS_FILE)
    write_markdown(folder, manifest, results)
    write_page(folder, manifest, results)


def _planned(
    study: Study, dataset: Dataset | None, workers: Sequence[Worker], measurement: Measurement
) -> dict[str, Recipe]:
    """The recipes at the study's budget. Without a data set, only a budget of epochs can be planned."""
    if dataset is None and (study.equal == "time" or (study.budget and study.budget[0] != "epochs")):
        raise StudyError("--dry-run: this budget needs the data; convert them first, or give --epochs")
    train_images = dataset.train_count if dataset else 0
    return planned(study, train_images, len(workers), measurement.epoch_seconds)


def _announce(
    study: Study, arguments: argparse.Namespace, workers: Sequence[Worker], say: Callable[[str], None]
) -> None:
    """Print every trial with the time that it will take, and the time of the whole. Nothing is written."""
    try:
        dataset = find_dataset(study.data, conversion=False, log=say)
        data = str(dataset.folder)
    except NotConverted as error:
        dataset, data = None, study.data
        say(f"data: {error}")
    measurement = Measurement(data, arguments.device, workers[0], say)
    recipes = _planned(study, dataset, workers, measurement)
    seconds = measurement.epoch_seconds(list(recipes.values()))
    rows, total = [], 0.0
    for seed in study.seeds:
        for (name, recipe), each in zip(recipes.items(), seconds, strict=True):
            time = None if each is None else each * recipe.train.epochs
            total += time or 0.0
            rows.append({"trial": f"{name}-seed-{seed}", "epochs": recipe.train.epochs, "predicted_seconds": time})
    known = all(row["predicted_seconds"] is not None for row in rows)
    whole = total / len(workers) if known else None
    if arguments.json:
        print(json.dumps({"study": study.name, "trials": rows, "predicted_seconds": whole}))
        return
    for row in rows:
        time = row["predicted_seconds"]
        words = "time known once the data are converted" if time is None else f"about {duration(time)}"
        print(f"{row['trial']}: {counted(row['epochs'], 'epoch')}, {words}")
    count = f"{len(rows)} trials on {len(workers)} worker{'s' * (len(workers) > 1)}"
    print(f"{count}: {'time known once the data are converted' if whole is None else f'about {duration(whole)}'}")


def _line(each: VariantResult) -> str:
    if each.summary is None:
        return f"{each.variant.name}: no trial is done"
    words = f"{each.variant.name}: {each.summary.mean:.2%}, n = {each.summary.n}"
    if each.summary.interval:
        words += f", 95% interval {each.summary.interval[0]:.2%} to {each.summary.interval[1]:.2%}"
    elif each.summary.n > 1:
        words += f", {NO_SPREAD} between the seeds"
    difference = each.difference
    if difference is None:
        return words
    words += f"; {100 * difference.mean:+.2f} points against {each.variant.reference}"
    if difference.interval:
        low, high = difference.interval
        words += f" ({100 * low:+.2f} to {100 * high:+.2f}{'' if difference.is_resolved else ', not resolved'})"
    elif difference.n > 1:
        words += f" ({NO_SPREAD} between the seeds)"
    return words


def _changes(arguments: argparse.Namespace) -> Changes:
    budgets = [("minutes", arguments.budget_minutes), ("epochs", arguments.epochs)]
    given = [(kind, amount) for kind, amount in budgets if amount is not None]
    if len(given) > 1:
        raise StudyError("--epochs and --budget-minutes: both say how long trials train; give one of them")
    return Changes(arguments.model, arguments.seeds, given[0] if given else None, arguments.data, tuple(arguments.set))


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 100_000):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 100,000; got {text!r}")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes <= 1_000_000:  # false for NaN
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most 1,000,000 minutes; got {text!r}")
    return minutes


def _cluster(text: str) -> str:
    """``ray`` or ``ray:ADDRESS``: the address, which may be empty."""
    name, _, address = text.partition(":")
    if name != "ray":
        raise argparse.ArgumentTypeError(f"expected ray or ray:ADDRESS; got {text!r}")
    return address


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("study"),
        description="Train recipes that differ in what is compared, with the same seeds, and write what their "
        "differences are worth. The same command goes on with a study that was stopped.",
        epilog=EXAMPLE,
    )
    parser.add_argument("study", help=f"one of {', '.join(study_names())}, or a TOML file")
    parser.add_argument("--out", help=f"the study's folder (default: {RUNS}/study-NAME)")
    parser.add_argument("--data", help="as of rsengine train (default: the study's)")
    parser.add_argument("--model", metavar="RECIPE", help="take the size of the network from this recipe")
    parser.add_argument("--seeds", metavar="N|A,B,…", help="how many seeds, or which; more are added to a study")
    parser.add_argument("--epochs", type=_positive, metavar="N", help="epochs of the base; others in proportion")
    parser.add_argument(
        "--budget-minutes", type=_minutes, metavar="N", help="minutes of the whole study, by measurement"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a setting of the base"
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        default=1,
        metavar="N",
        help="trials at a time, each with a GPU or its share of cores",
    )
    parser.add_argument(
        "--on",
        type=_cluster,
        metavar="ray[:ADDRESS]",
        help="train on a Ray cluster, whose nodes share --out and the data",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--accept-code", action="store_true", help="go on with trials that other code made")
    parser.add_argument(
        "--dry-run", action="store_true", help="list the trials and their predicted times; write nothing"
    )
    add_output_options(parser, result="the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
