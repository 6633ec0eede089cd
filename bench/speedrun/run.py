"""`python -m bench.speedrun --data DATA`: the runs of docs/speedrun.md on the test set, one after another.

The recipe `speedrun` with three seeds and `speedrun-94`, each to its end; timm's resnetrs50
(:mod:`bench.speedrun.timm`) and the report's recipe 4 for --minutes at most, evaluation included. Ctrl-C stops; the
same command goes on: an interrupted run is resumed, and a finished one only prints its result again. What has
finished is kept in test_set.jsonl (:mod:`bench.speedrun.runs`) and in docs/speedrun.md.
"""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.speedrun import runs, table
from rsengine.run.files import CHECKPOINT_FILE
from rsengine.run.log import RunLog

BASELINES = ("timm-resnetrs50", "report-4")  # stopped by the clock; rsengine's own recipes have as many epochs as fit


def commands(out: Path, data: str | None, seeds: Sequence[int], label: str = "") -> dict[str, list[str]]:
    """The command of each run, by name; it resumes a run that has a checkpoint under ``out``.

    Args:
        label: where it is not empty, the part of a name behind the recipe's.
    """
    end = f"-{label}" if label else ""

    def command(module: str, name: str, *options: str) -> list[str]:
        source = ["--data", data] if data else []
        return [sys.executable, "-m", module, *source, "--out", str(out / name), *options]

    def recipe(recipe: str, name: str, *options: str) -> list[str]:
        resumed = (out / name / CHECKPOINT_FILE).exists()
        return command("rsengine.train", name, *(["--resume"] if resumed else ["--recipe", recipe, *options]))

    found = {}
    for seed in seeds:
        name = f"speedrun{end}-seed{seed}"
        found[name] = recipe("speedrun", name, "--seed", str(seed))
    found[f"timm-resnetrs50{end}"] = command("bench.speedrun.timm", f"timm-resnetrs50{end}")  # goes on by itself
    for name in ("report-4", "speedrun-94"):
        found[name + end] = recipe(name, name + end)
    return found


def run(command: Sequence[str], folder: Path, *, seconds: float, poll: float = 5.0, cwd: Path | None = None) -> int:
    """Run ``command``, which writes its metrics into ``folder``, until it ends or has used ``seconds`` of its own
    clock; then stop it as Ctrl-C would. Returns its exit status; 0 at once where its time is up already."""
    if seconds_of(folder) >= seconds:
        return 0
    # The background jobs of a shell ignore Ctrl-C, and their children would too: they could not be stopped.
    process = subprocess.Popen(command, cwd=cwd, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        while process.poll() is None and seconds_of(folder) < seconds:
            time.sleep(poll)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        return process.wait()
    except KeyboardInterrupt:  # which the process has received too: it saves
        process.wait()
        raise


def seconds_of(folder: Path) -> float:
    """Seconds of training and evaluation that the run in ``folder`` has recorded."""
    return max((record.get("seconds", 0.0) for record in RunLog(folder).records()), default=0.0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speedrun", description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="as of python -m rsengine.train")
    parser.add_argument("--out", type=Path, default=Path("runs/speedrun"), help="folder of the runs (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="RUN", help="some of the runs, by their names in test_set.jsonl")
    parser.add_argument(
        "--label", default="", help="joined to the names, so that no run of another processor gives way"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="longest run of a baseline (default: %(default)g)")
    arguments = parser.parse_args()
    known = commands(arguments.out, arguments.data, arguments.seeds, arguments.label)
    unknown = set(arguments.only or []) - set(known)
    if unknown:
        parser.error(f"--only: expected some of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    for name, command in known.items():
        if arguments.only and name not in arguments.only:
            continue
        print(f"{name}: {shlex.join(command)}", flush=True)
        folder = arguments.out / name
        status = run(command, folder, seconds=60 * arguments.minutes if name.startswith(BASELINES) else math.inf)
        if status not in (0, 128 + signal.SIGINT):
            return status
        finished = runs.read(folder)
        if finished.epochs:
            runs.add(finished, runs.TEST_SET)
            table.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
