"""Train one small model with more and more augmentation, at equal epochs, and tabulate the test accuracies.

    python scripts/compare_augmentation.py --out runs/augmentation --epochs 5 --seeds 0 1

Runs that are finished are not run again and one that was broken off is resumed, so that the script can be stopped and
started at any moment. It writes table.md into its folder.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from rsengine.run.log import EPOCH, RunLog

CROP_FLIP = ["augment.crop_padding=4", "augment.flip=true"]
CUTOUT = [*CROP_FLIP, "augment.cutout_holes=4", "augment.cutout_size=4"]
SETTINGS = {
    "none": ["augment.crop_padding=0", "augment.flip=false"],
    "crop + flip": CROP_FLIP,
    "crop + flip + Cutout 4 x 4x4": CUTOUT,
    "crop + flip + Cutout + AutoAugment": [*CUTOUT, "augment.policy=autoaugment"],
    "crop + flip + Cutout + RandAugment 2, 9": [*CUTOUT, "augment.policy=randaugment"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/augmentation", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="some of the settings")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    for number, (name, settings) in enumerate(SETTINGS.items(), 1):
        for seed in arguments.seeds if name in arguments.only else []:
            folder = out / f"{number}-seed{seed}"
            if len(epochs_of(folder)) == arguments.epochs:
                continue
            command = [sys.executable, "-m", "rsengine.train", "--recipe", arguments.recipe, "--out", str(folder)]
            command += [f"--seed={seed}", f"--epochs={arguments.epochs}"]
            command += [part for setting in settings for part in ("--set", setting)]
            command += ["--resume"] * (folder / "checkpoint.pt").exists()
            print(f"{name}, seed {seed}", flush=True)
            status = subprocess.run(command).returncode
            if status:
                return status
    (out / "table.md").write_text(table(out, arguments.recipe, arguments.epochs, arguments.seeds))
    print((out / "table.md").read_text())
    return 0


def epochs_of(folder: Path) -> list[dict]:
    """The epoch records of a run, none where there is no run."""
    return RunLog(folder).records(EPOCH)


def table(out: Path, recipe: str, epochs: int, seeds: list[int]) -> str:
    """Markdown: a row a setting, with what is there so far."""
    head = [
        f"Recipe {recipe}, {epochs} epochs, seeds {', '.join(map(str, seeds))}; test accuracy, mean over seeds.",
        "",
    ]
    head += ["| Augmentation | EMA weights | each seed | raw weights | training accuracy |", "|---|---|---|---|---|"]
    rows = []
    for number, name in enumerate(SETTINGS, 1):
        runs = [epochs_of(out / f"{number}-seed{seed}") for seed in seeds]
        last = [run[-1] for run in runs if len(run) == epochs]
        if last:
            ema = [record["test_accuracy_ema"] for record in last]
            means = [statistics.mean(r[key] for r in last) for key in ("test_accuracy", "train_accuracy")]
            each = ", ".join(f"{value:.2%}" for value in ema)
            rows.append(f"| {name} | {statistics.mean(ema):.2%} | {each} | {means[0]:.2%} | {means[1]:.2%} |")
    return "\n".join([*head, *rows]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
