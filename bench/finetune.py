"""`python -m bench.finetune --data DATA`: what given weights are worth where there are few images.

Half of CIFAR-10's classes are learned from all of their images. A network then learns the other half from 500 images a
class: from scratch, from the weights of the first half, and from those with its lower parts frozen and its body slowed.
Each way and each seed, which draws the images too, is one run of the public commands. Ctrl-C stops; the same command
goes on, and what is done is not done again. The table is written to bench/results/finetune.md.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsengine.run.files import CHECKPOINT_FILE, WEIGHTS_FILE
from rsengine.run.log import EPOCH, START, RunLog, accuracy

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "finetune.md"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LEARNED, NEW = CLASSES[::2], CLASSES[1::2]  # alternately, so that each half has animals and vehicles
IMAGES = 500  # a class
FIRST_EPOCHS, EPOCHS = 8, 12
FEW = ["train.batch_size=64", f"train.evaluate_every={EPOCHS}"]
# How each way begins, and its settings. The rates are a choice made before any run, not the best of several.
WAYS = {
    "from scratch": (False, ["schedule.learning_rate=0.2"]),
    "fine-tuned": (True, ["schedule.learning_rate=0.05"]),
    "fine-tuned, stem and stage1 frozen, body at a tenth of the rate": (
        True,
        ["schedule.learning_rate=0.1", "train.freeze=stem,stage1", "optimizer.body_rate=0.1"],
    ),
}


def conversions(out: Path, data: str, seeds: Sequence[int]) -> dict[Path, list[str]]:
    """The command that makes each data set, by its folder."""

    def command(folder: Path, classes: Sequence[str], *options: str) -> list[str]:
        convert = [sys.executable, str(ROOT / "data" / "convert.py"), data]
        return [*convert, "--classes", ",".join(classes), *options, "--out", str(folder), "--quiet"]

    amount = ["--subset", str(IMAGES * len(NEW))]
    found = {out / "data-learned": command(out / "data-learned", LEARNED)}
    return found | {
        folder: command(folder, NEW, *amount, "--seed", str(seed)) for seed in seeds for folder in [new_data(out, seed)]
    }


def new_data(out: Path, seed: int) -> Path:
    return out / f"data-new-seed{seed}"


def runs(out: Path, seeds: Sequence[int]) -> dict[Path, tuple[int, list[str]]]:
    """The epochs of each run, and the command that begins it, by its folder; those of the first half come first."""

    def command(folder: Path, data: Path, epochs: int, *options: str) -> tuple[int, list[str]]:
        base = [sys.executable, "-m", "rsengine.train", "--data", str(data), "--out", str(folder)]
        return epochs, [*base, "--recipe", "quickstart", f"--epochs={epochs}", *options]

    first = out / "learned"
    found = {first: command(first, out / "data-learned", FIRST_EPOCHS)}
    for number, (given, settings) in enumerate(WAYS.values(), 1):
        for seed in seeds:
            folder = run_folder(out, number, seed)
            options = [f"--set={setting}" for setting in [*FEW, *settings]]
            options += [f"--init={first / WEIGHTS_FILE}"] if given else []
            found[folder] = command(folder, new_data(out, seed), EPOCHS, f"--seed={seed}", *options)
    return found


def run_folder(out: Path, number: int, seed: int) -> Path:
    return out / f"{number}-seed{seed}"


def resumed(command: list[str]) -> list[str]:
    """The command that goes on with a run."""
    return [*command[: command.index("--recipe")], "--resume"]


def is_done(folder: Path, epochs: int) -> bool:
    records = RunLog(folder).records(EPOCH)
    return bool(records) and records[-1]["epoch"] == epochs


def table(out: Path, seeds: Sequence[int]) -> str:
    """Markdown: a row a way, with the runs in ``out`` that are done; nothing where none is."""
    rows, start = [], None
    for number, (name, (_, settings)) in enumerate(WAYS.items(), 1):
        folders = [run_folder(out, number, seed) for seed in seeds]
        logs = [RunLog(folder) for folder in folders if is_done(folder, EPOCHS)]
        if not logs:
            continue
        start = logs[0].records(START)[0]
        last = [log.records(EPOCH)[-1] for log in logs]
        scores = [100 * accuracy(record) for record in last]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        cells = [
            name,
            ", ".join(f"`{setting}`" for setting in settings),
            f"{statistics.mean(scores):.2f}{spread}",
            ", ".join(f"{score:.2f}" for score in scores),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    if start is None:
        return ""
    first = RunLog(out / "learned").records(EPOCH)[-1]
    lines = [
        "# Fine-tuning beside training from scratch",
        "",
        f"`python -m bench.finetune` on {about(start)}.",
        "",
        f"Recipe `quickstart`. First {', '.join(LEARNED)} are learned from all of their images in {first['epoch']} "
        f"epochs ({100 * accuracy(first):.2f} % of their test images). Then {', '.join(NEW)} are learned from {IMAGES} "
        f"images each in {EPOCHS} epochs of batches of 64. Test accuracy in percent (EMA, last epoch) over all test "
        f"images of the new classes, mean ± standard deviation over the seeds {', '.join(map(str, seeds))}, which draw "
        f"the images too. The rates were chosen before any run, not searched for.",
        "",
        "| way | settings | accuracy, % | each seed |",
        "|---|---|---:|---:|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def about(start: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in start["versions"].items() if version)
    return f"{start['machine']['processor']}, {start['precision']}, {start['threads']} threads; {packages}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.finetune", description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 in any form that data/convert.py reads")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder of the runs (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the table goes (%(default)s)")
    arguments = parser.parse_args()
    out, seeds = arguments.out, arguments.seeds
    for folder, command in conversions(out, arguments.data, seeds).items():
        if not folder.exists() and (status := called(folder.name, command)):
            return status
    for folder, (epochs, command) in runs(out, seeds).items():
        if is_done(folder, epochs):
            continue
        if status := called(folder.name, resumed(command) if (folder / CHECKPOINT_FILE).exists() else command):
            return status
    arguments.results.write_text(table(out, seeds), encoding="utf-8")
    print(table(out, seeds))
    return 0


def called(name: str, command: Sequence[str]) -> int:
    print(f"{name}: {shlex.join(command)}", flush=True)
    return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
