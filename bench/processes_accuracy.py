"""`python -m bench.processes_accuracy --data DATA`: the accuracy of one recipe in one process and in one for each core.

Each way and each seed is one run of the training command, in turn. Ctrl-C stops; the same command goes on, and what is
done is not done again. Writes its table into bench/results/processes.md. About eleven minutes on two cores where
nothing else runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.finetune import about, called, is_done, resumed
from bench.processes import ACCURACY, RESULTS, write
from rsengine.config import load_recipe
from rsengine.run.files import CHECKPOINT_FILE, RECIPE_FILE
from rsengine.run.log import EPOCH, START, RunLog, accuracy

RECIPE, EPOCHS, BATCHES = "quickstart", 3, 97  # of the 195 batches of an epoch of CIFAR-10: half of the images


def runs(out: Path, data: str, seeds: Sequence[int], processes: int, batches: int) -> dict[Path, list[str]]:
    """The command that begins each run, by its folder: of each seed, first in one process and then in several."""
    found = {}
    for seed in seeds:
        for count in (1, processes):
            folder = run_folder(out, count, seed)
            command = [sys.executable, "-m", "rsengine.train", "--data", data, "--out", str(folder)]
            command += [f"--processes={count}"] if count > 1 else []
            command += ["--recipe", RECIPE, f"--seed={seed}", f"--epochs={EPOCHS}", f"--limit-train-batches={batches}"]
            found[folder] = [*command, f"--set=train.evaluate_every={EPOCHS}"]
    return found


def run_folder(out: Path, processes: int, seed: int) -> Path:
    return out / f"processes{processes}-seed{seed}"


def table(out: Path, seeds: Sequence[int], processes: int) -> str:
    """The section of the results, with the runs in ``out`` that are done; nothing where none is."""
    rows, start, folder = [], None, out
    for count in (1, processes):
        folders = [run_folder(out, count, seed) for seed in seeds]
        folders = [each for each in folders if is_done(each, EPOCHS)]
        if not folders:
            continue
        logs, folder = [RunLog(each) for each in folders], folders[0]
        start = start or logs[0].records(START)[0]
        last = [log.records(EPOCH)[-1] for log in logs]
        scores = [100 * accuracy(record) for record in last]
        error = f" ± {statistics.stdev(scores) / len(scores) ** 0.5:.2f}" if len(scores) > 1 else ""
        rate = statistics.median(record["images_per_second"] for record in last)
        each = ", ".join(f"{score:.2f}" for score in scores)
        rows.append(f"| {count} | {statistics.mean(scores):.2f}{error} | {each} | {rate:,.0f} |")
    if start is None:
        return ""
    train = load_recipe(str(folder / RECIPE_FILE)).train
    lines = [
        ACCURACY,
        "",
        f"`python -m bench.processes_accuracy` on {about(start)}. Several processes share the threads.",
        "",
        f"Recipe `{RECIPE}`: {train.epochs} epochs of {train.limit_train_batches} batches of {train.batch_size}; "
        f"batch norm `{train.batch_norm}`. Test accuracy in percent (EMA, last epoch), mean ± standard error over the "
        f"seeds {', '.join(map(str, seeds))}; images/s of the last epoch, the median over the seeds.",
        "",
        "| processes | accuracy, % | each seed | images/s |",
        "|---:|---:|---|---:|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.processes_accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 in any form that data/convert.py reads")
    parser.add_argument("--out", type=Path, default=Path("runs/processes"), help="folder of the runs (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=BATCHES, help="of each epoch (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table goes (%(default)s)")
    arguments = parser.parse_args()
    out, seeds, processes = arguments.out, arguments.seeds, torch.get_num_threads()
    if processes < 2:
        parser.error("one core, or one thread (OMP_NUM_THREADS): several processes have nothing to share")
    for folder, command in runs(out, arguments.data, seeds, processes, arguments.batches).items():
        if is_done(folder, EPOCHS):
            continue
        if status := called(folder.name, resumed(command) if (folder / CHECKPOINT_FILE).exists() else command):
            return status
    section = table(out, seeds, processes)
    write(section, ACCURACY, results=arguments.results)
    print(section)
    return 0


if __name__ == "__main__":
    sys.exit(main())
