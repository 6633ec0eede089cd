"""``report.md``: a run, its results and its machine, written from the records in the run folder."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rsengine.output import counted
from rsengine.run.files import AUGMENTED_FILE, CONFUSION_FILE, CURVES_FILE, METRICS_FILE, REPORT_FILE, write_atomically
from rsengine.run.formats import NONE, count, fixed, known, percent, significant
from rsengine.run.log import EPOCH, INTERVAL, START, RunLog, accuracy
from rsengine.run.progress import duration

# File name, and the text for a reader who cannot see the picture.
_PICTURES = {
    CURVES_FILE: "Loss, accuracy and learning rate against epochs",
    CONFUSION_FILE: "Confusion matrix of the test set, in percent of each true class",
    AUGMENTED_FILE: "Training images before and after augmentation",
}
# Of a table of epochs: headings, and the text of a cell from a record.
EPOCH_COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("Epoch", lambda r: str(r["epoch"])),
    ("Train loss", lambda r: fixed(r["train_loss"], 4)),
    ("Train acc.", lambda r: percent(r["train_accuracy"])),
    ("Test loss", lambda r: fixed(r["test_loss"], 4)),
    ("Test acc.", lambda r: percent(r["test_accuracy"])),
    ("Test loss, EMA", lambda r: fixed(r["test_loss_ema"], 4)),
    ("Test acc., EMA", lambda r: percent(r["test_accuracy_ema"])),
    ("Learning rate", lambda r: significant(r["learning_rate"])),
    ("Images/s", lambda r: count(r["images_per_second"])),
    ("Seconds", lambda r: fixed(r["seconds"], 1)),
]
_TABLE_ROWS = 42  # about 40; two more let 200 epochs be shown as 1, 5, 10, …, 200


def write_report(
    folder: Path,
    *,
    recipe_toml: str,
    title: str,
    dataset_line: str,
    model_lines: Sequence[str],
    confusion: np.ndarray | None,
    classes: Sequence[str],
    notes: Sequence[str],
    planned_epochs: int,
    labels: Sequence[str] = (),
) -> None:
    """Write ``report.md`` into a run folder, replacing an older one atomically.

    Numbers come from the folder's ``metrics.jsonl``; machine and versions are those of its last ``start`` record.
    Pictures are linked if their files exist (``curves.png``, ``confusion.png``, ``augmented.png``), so draw them first.

    Args:
        folder: the run folder.
        recipe_toml: the complete recipe, printed as it is.
        title: the heading.
        dataset_line: one line of Markdown: name, image counts, image size, classes.
        model_lines: lines of Markdown about the model, e.g. name, parameters, multiply-adds.
        confusion: (C, C) int64 counts, row = true class, column = prediction, of the whole test set; or None.
        classes: the C class names.
        notes: lines of Markdown, e.g. the exact command that repeats the run.
        planned_epochs: epochs the recipe asks for; with fewer done, the report calls the run unfinished.
        labels: what the pictures call the C classes, if not by their names; the report then has the key to them.

    Raises:
        FileNotFoundError: the folder has no ``metrics.jsonl``.
        ValueError: that file is damaged.
    """
    log = RunLog(folder)
    if not log.path.exists():
        raise FileNotFoundError(f"{log.path}: a report needs the run's log")
    starts, intervals, epochs = (log.records(kind) for kind in (START, INTERVAL, EPOCH))

    parts = [f"# {_plain(title)}"]
    done = max((record["epoch"] for record in epochs), default=0)
    if done < planned_epochs:
        parts.append(
            f"> **Unfinished run:** {done} of {planned_epochs} planned epochs are done. "
            "What follows is how far it came, not the recipe's result."
        )
    parts.append(_headline(starts, intervals, epochs, confusion, done, planned_epochs))
    parts += ["## Data and model", _bullets([dataset_line, *model_lines]), "## Notes", _bullets(notes)]
    curves, matrix, augmented = (_picture(folder, name) for name in _PICTURES)
    if curves or epochs:
        parts += ["## Training", *curves, *_epoch_table(epochs)]
    key = _key(classes, labels or classes)
    if matrix or key or confusion is not None:
        parts += ["## Classes", *matrix, *key]
    if confusion is not None:
        parts += [*_class_tables(confusion, classes), *_confusions(confusion, classes)]
    if augmented:
        parts += ["## What the network is shown", *augmented]
    parts += ["## Recipe", _fenced(recipe_toml, "toml")]
    parts += ["## Machine and versions", *_machine_table(starts)]

    # Names may hold bytes that are no text.
    write_atomically(folder / REPORT_FILE, ("\n\n".join(parts) + "\n").encode(errors="backslashreplace"))


def _headline(
    starts: list[dict[str, Any]],
    intervals: list[dict[str, Any]],
    epochs: list[dict[str, Any]],
    matrix: np.ndarray | None,
    done: int,
    planned: int,
) -> str:
    rows: list[tuple[str, str]] = []
    for name, field in (("EMA weights", "test_accuracy_ema"), ("raw weights", "test_accuracy")):
        tested = [record for record in epochs if record[field] is not None]
        if not tested:
            rows.append((f"Test accuracy, {name}", "not evaluated"))
            continue
        # The last epoch is the result, because nothing about the test set had a part in choosing it.
        last, best = tested[-1], max(tested, key=lambda record: record[field])
        rows.append((f"**Test accuracy, {name}**", f"**{percent(last[field])}** after epoch {last['epoch']}"))
        rows.append((f"Best test accuracy, {name}", f"{percent(best[field])} after epoch {best['epoch']} ¹"))
    rows.append(("Epochs", f"{done} of {planned} planned"))
    rows += speed_rows(starts, intervals, epochs)

    lines = [_table(("Result", ""), rows)]
    sampling = ""
    if epochs and matrix is not None:
        final, images = accuracy(epochs[-1]), int(matrix.sum())
        error = 100 * math.sqrt(final * (1 - final) / images)
        sampling = f" The {images:,} test images alone leave a standard error of {error:.2f} percentage points."
    if epochs:
        lines += [
            "¹ The best epoch was chosen by its test accuracy, so that number is optimistic; "
            "the result of this run is the last epoch's.",
            f"One run, n = 1: no spread over seeds is measured here.{sampling}",
        ]
    return "\n\n".join(lines)


def speed_rows(
    starts: list[dict[str, Any]], intervals: list[dict[str, Any]], epochs: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """Times, speed, resumes and device of a run, from the records of its log: names and values as text."""
    rows = []
    if epochs:
        evaluation = duration(sum(record["eval_seconds"] for record in epochs))
        rows.append(("Training time", f"{duration(epochs[-1]['seconds'])}, of which evaluation {evaluation}"))
    if intervals:
        rate = count(statistics.median(record["images_per_second"] for record in intervals))
        of = f"{len(intervals)} log interval{'' if len(intervals) == 1 else 's'}"
        rows.append(("Images per second", f"{rate}, median of {of}"))
    if not starts:
        return rows  # the log lost them
    first, *later = (f"{record['time_to_first_step']:.1f} s" for record in starts)
    rows.append(("Time to first step", first + (f"; on resuming {', '.join(later)}" if later else "")))
    resumed = [f"{record['step']:,}" for record in starts if record["resumed"]]
    times = "once" if len(resumed) == 1 else f"{len(resumed)} times"
    rows.append(("Resumed", f"{times}, at step {', '.join(resumed)}" if resumed else "no"))
    last = starts[-1]
    rows.append(("Ran on", f"{last['device']}, {last['precision']}, {counted(last['threads'], 'thread')}"))
    return rows


def _epoch_table(epochs: list[dict[str, Any]]) -> list[str]:
    if not epochs:
        return []
    shown, stride = thinned(epochs)
    rows = [tuple(cell(record) for _, cell in EPOCH_COLUMNS) for record in shown]
    table = _table([name for name, _ in EPOCH_COLUMNS], rows, align="right")
    if stride == 1:
        return [table]
    return [
        f"{len(shown)} of {len(epochs)} epochs: every {stride}th, the first and the last. "
        f"`{METRICS_FILE}` has them all.",
        table,
    ]


def thinned(epochs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """At most `_TABLE_ROWS` records: the first, the last and every ``stride``-th epoch between; and the stride."""
    if len(epochs) <= _TABLE_ROWS:
        return epochs, 1
    # Round strides, so that the epochs shown are 5, 10, 15 and not 7, 14, 21; 2 and 3 would read "2th" and "3th".
    strides = (step * 10**power for power in range(9) for step in (4, 5, 10, 20, 25))
    for stride in sorted(set(strides)):
        last = len(epochs) - 1
        shown = [r for i, r in enumerate(epochs) if i in (0, last) or r["epoch"] % stride == 0]
        if len(shown) <= _TABLE_ROWS:
            return shown, stride
    raise AssertionError("a stride beyond the number of epochs leaves two rows")


def _class_tables(matrix: np.ndarray, classes: Sequence[str]) -> list[str]:
    totals = matrix.sum(axis=1)
    right = np.diagonal(matrix)
    rows = [
        (_plain(name), percent(right[i] / totals[i]) if totals[i] else NONE, count(totals[i]))
        for i, name in enumerate(classes)
    ]
    head = ("Class", "Accuracy", "Test images")
    images = int(totals.sum())
    overall = f" Over all {images:,} test images: {percent(right.sum() / images)}." if images else ""
    if len(rows) <= 20:
        return [f"Accuracy of each class.{overall}", _table(head, rows, align="right")]
    tested = [i for i in range(len(rows)) if totals[i]]
    weakest = sorted(tested, key=lambda i: right[i] / totals[i])[:10]
    return [
        f"The ten classes with the lowest accuracy.{overall}",
        _table(head, [rows[i] for i in weakest], align="right"),
        f"<details><summary>All {len(rows)} classes</summary>",
        _table(head, rows, align="right"),
        "</details>",
    ]


def _key(classes: Sequence[str], labels: Sequence[str]) -> list[str]:
    rows = [(label, _plain(name)) for label, name in zip(labels, classes, strict=True) if label != name]
    if not rows:
        return []
    why = "No font on the machine had the characters of these names, so the pictures number them."
    return [why, _table(("In the pictures", "Class"), rows)]


def _confusions(matrix: np.ndarray, classes: Sequence[str]) -> list[str]:
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    # Stable, so that equal counts stay in the order of the classes.
    order = np.argsort(-wrong, axis=None, kind="stable")[:5]
    rows = []
    for true, predicted in zip(*np.unravel_index(order, wrong.shape), strict=True):
        images = wrong[true, predicted]
        if images:
            share = percent(images / matrix[true].sum())
            rows.append((_plain(classes[true]), _plain(classes[predicted]), count(images), share))
    if not rows:
        return ["No test image was misclassified."]
    head = ("True class", "Predicted as", "Images", "Of the true class")
    return ["The most frequent confusions.", _table(head, rows, align="right", left=2)]


def machine_rows(starts: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The machine and the versions of the last of the ``start`` records, one or more: names and values as text."""
    here, packages = (starts[-1].get(name) or {} for name in ("machine", "versions"))
    rows = [("Processor", known(here.get("processor")))]
    physical, logical = here.get("physical_cores"), here.get("logical_cores")
    cores = f"{known(logical)} logical" + (f" on {physical} physical" if physical else "")
    rows.append(("Cores usable", cores))
    ram = here.get("ram_gib")
    rows.append(("Memory", f"{ram:.1f} GiB" if ram is not None else NONE))
    rows.append(("GPU", ", ".join(here.get("gpus") or []) or "none"))
    rows += [("System", known(here.get("os"))), ("Python", known(here.get("python")))]
    rows += [(name, version or "not installed") for name, version in packages.items()]
    return rows


def _machine_table(starts: list[dict[str, Any]]) -> list[str]:
    if not starts:
        return ["The log has lost what it said of them."]
    return [_table(("", ""), [(name, _plain(value)) for name, value in machine_rows(starts)])]


def _picture(folder: Path, name: str) -> list[str]:
    return [f"![{_PICTURES[name]}]({name})"] if (folder / name).is_file() else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, align: str = "left", left: int = 1) -> str:
    """A Markdown table; with ``align="right"`` all but the first ``left`` columns hold numbers."""
    rule = ["---:" if align == "right" and column >= left else "---" for column in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join("- " + " ".join(line.split()) for line in lines)


def _fenced(text: str, language: str) -> str:
    # Longer than any run of backticks inside, or the block would end there.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip(chr(10))}\n{fence}"


def _plain(words: Any) -> str:
    """Text that Markdown prints as it is, on one line and in one table cell."""
    return re.sub(r"([\\`*<\[|])", r"\\\1", " ".join(str(words).split()))
