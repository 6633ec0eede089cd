"""What a resume makes whole again: the files beside the checkpoint that a kill or a full disk kept from being written.

The checkpoint comes first, then what is made from it. So whatever is missing, damaged or of an earlier moment can be
made again from the checkpoint, as long as no later one has taken its place.
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from rsengine.config import Recipe
from rsengine.device import Execution
from rsengine.run.checkpoint import CheckpointError, load_checkpoint
from rsengine.run.files import BEST_FILE, CHECKPOINT_FILE, RECIPE_FILE, WEIGHTS_FILE, atomic_path, write_atomically
from rsengine.run.log import EPOCH, INTERVAL, START, RunLog
from rsengine.run.weights import holds_weights, save_weights

MOST_NAMED = 4  # losses in one line


def copy_best(folder: Path) -> None:
    """Make ``best.pt`` of the checkpoint."""
    with atomic_path(folder / BEST_FILE) as temporary:
        shutil.copyfile(folder / CHECKPOINT_FILE, temporary)


def renew(
    folder: Path,
    *,
    recipe: Recipe,
    model: nn.Module,
    dataset: object,
    epoch: int,
    batch: int,
    best_epoch: int,
    say: Callable[[str], None],
) -> None:
    """Make again what should have been made from the checkpoint in ``folder``, and say which files that were.

    Args:
        model: whose weights are the result, as the checkpoint has them.
        epoch, batch: how far the checkpoint is: epochs, and batches of the one under way.
        best_epoch: the epoch after which the best checkpoint was taken; 0 for none yet.
    """
    made = []
    toml = recipe.to_toml().encode()
    path = folder / RECIPE_FILE
    if not path.is_file() or path.read_bytes() != toml:
        write_atomically(path, toml)
        made.append(RECIPE_FILE)
    if epoch and not batch:
        if not holds_weights(folder / WEIGHTS_FILE, model, recipe, dataset):
            save_weights(folder, model, recipe, dataset)
            made.append(WEIGHTS_FILE)
        best = folder / BEST_FILE
        if best_epoch == epoch and not (best.is_file() and filecmp.cmp(folder / CHECKPOINT_FILE, best, shallow=False)):
            copy_best(folder)
            made.append(BEST_FILE)
    if made:
        say(f"made again from the checkpoint, because missing, damaged or out of date: {', '.join(made)}")
    if best_epoch and (best_epoch, 0) != (epoch, batch) and (wrong := _not_of(folder / BEST_FILE, best_epoch)):
        say(
            f"{folder / BEST_FILE}: {wrong}; it cannot be made again, because the checkpoint is of a later moment than "
            f"the best epoch, {best_epoch}"
        )


def _not_of(path: Path, epoch: int) -> str:
    """What is wrong with ``path`` as the checkpoint taken after ``epoch``, if something is."""
    try:
        state = load_checkpoint(path)
    except CheckpointError:
        return "damaged" if path.exists() else "missing"
    return "" if state["epoch"] == epoch else f"of epoch {state['epoch']}"


def lost_records(log: RunLog, *, step: int, interval: int, evaluated: Sequence[int]) -> str:
    """What a log lacks of a run that is at ``step``, in words, or nothing.

    Args:
        interval: the steps between two records.
        evaluated: the epochs after which there was an evaluation.
    """
    recorded = {record["step"] for record in log.records(INTERVAL)}
    steps = sorted({0, step, *recorded})
    pairs = zip(steps, steps[1:], strict=False)
    lost = [f"steps {a} to {b}" for a, b in pairs if b - a > interval or b not in recorded]
    lost += ["the start"] if step and not log.records(START) else []
    found = {record.get("epoch") for record in log.records(EPOCH)}
    lost += [f"the evaluation after epoch {epoch}" for epoch in evaluated if epoch not in found]
    return ", ".join(lost[:MOST_NAMED]) + f" and {len(lost) - MOST_NAMED} more" * (len(lost) > MOST_NAMED)


def what_changed(log: RunLog, execution: Execution, processes: int) -> str:
    """How this process, one of ``processes``, differs from the last one that worked on the run so that sums are rounded
    in another order or to another precision; or nothing."""
    starts = log.records(START)
    now = {"device": execution.device.type, "precision": execution.precision, "processes": processes}
    if execution.device.type == "cpu":
        now["threads"] = execution.threads
    before = {"processes": 1} | starts[-1] if starts else {}  # older records say nothing of processes
    changed = [name for name, value in now.items() if before.get(name, value) != value]
    return ", ".join(f"{name} {before[name]}, now {now[name]}" for name in changed)
