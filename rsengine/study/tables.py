"""The tables of a study, as rows of text that ``results.md`` and ``results.html`` share, and ``results.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rsengine.output import escaped
from rsengine.run.files import write_atomically
from rsengine.run.formats import NO_SPREAD, NONE, fixed
from rsengine.study.manifest import Manifest
from rsengine.study.pictures import CURVES_FILE, INTERVALS_FILE
from rsengine.study.results import MARKDOWN_FILE, VariantResult, codes
from rsengine.study.statistics import Difference, Summary


@dataclass(frozen=True)
class Table:
    """A title, a head, and rows of text below it; ``numbers``: the columns that hold numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int]
    note: str = ""


def tables(manifest: Manifest, results: Sequence[VariantResult]) -> Iterator[Table]:
    """Every table of the study that has something in it."""
    yield _accuracies(manifest, results)
    if any(each.difference for each in results):
        yield _comparisons(manifest, results)
    if any(each.ema for each in results):
        rows = [[each.variant.name, *_compared(each.ema)] for each in results if each.ema]
        note = "The EMA weights against the raw weights of the same trials, after the last epoch."
        yield Table("EMA against raw weights", ("Variant", *_COMPARED), rows, range(1, 7), note)
    if any(value for each in results for value, _ in each.calibration.values()):
        yield _calibration(results)
    if warned := list(_warned(results)):
        yield Table("Warnings", ("Variant", "What its trials said"), warned, ())
    if failed := [trial for each in results for trial in each.failed]:
        rows = [[each.trial.name, each.outcome.status, each.outcome.why] for each in failed]
        yield Table("Trials that ended with an error", ("Trial", "How", "What it said"), rows, ())


def _warned(results: Sequence[VariantResult]) -> Iterator[list[str]]:
    for each in results:
        for warning in dict.fromkeys(warning for trial in each.trials for warning in trial.warnings):
            yield [each.variant.name, warning]


def heading(manifest: Manifest, results: Sequence[VariantResult]) -> list[str]:
    """What the study is about, in a few lines."""
    study, data = manifest.study, manifest.data
    done = sum(trial.is_done for each in results for trial in each.trials)
    seeds = ", ".join(map(str, study.seeds))
    lines = [study.comment] if study.comment else []
    lines.append(
        f"{done} of {len(study.variants) * len(study.seeds)} trials are done: {len(study.variants)} variants with "
        f"seeds {seeds}, on {data['name']}, {data['train_images']:,} train and {data['test_images']:,} test images."
    )
    made = codes(results)
    if len(made) > 1:
        lines.append(f"The trials were made with {len(made)} versions of the code: {'; '.join(made)}.")
    elif made:
        lines.append(f"Code: {made[0]}.")
    return lines


def _accuracies(manifest: Manifest, results: Sequence[VariantResult]) -> Table:
    reported = any(each.variant.accuracy is not None for each in results)
    head = ["Variant", "Changes", "Epochs", "n", "Mean (%)", "Std. dev.", "95 % interval"]
    rows = []
    for each in results:
        changes = ", ".join(each.variant.changes) or NONE
        epochs = str(manifest.recipes[each.variant.name].train.epochs)
        row = [each.variant.name, changes, epochs, str(len(each.accuracy)), *_summarised(each.summary, 100, 2)]
        rows.append([*row, fixed(each.variant.accuracy, 2)] if reported else row)
    note = (
        "Test accuracy after the last epoch, of the EMA weights, or of the raw ones in a recipe without EMA. The "
        "interval is Student's t over the seeds, of the mean. Changes are as the study's file has them; a budget "
        "scales epochs."
    )
    if reported:
        head.append("Reported (%)")
        note += f" Reported: {manifest.study.source}."
    return Table("Test accuracy", head, rows, range(2, len(head)), note)


_COMPARED = ("n", "Difference", "95 % interval", "Bootstrap", "p, one-sided", "Seeds needed")


def _comparisons(manifest: Manifest, results: Sequence[VariantResult]) -> Table:
    reported = any(each.variant.difference is not None for each in results)
    rows = []
    for each in results:
        if each.variant.reference:
            row = [each.variant.name, each.variant.reference, *_compared(each.difference)]
            rows.append([*row, _signed(each.variant.difference, 1.0, 1)] if reported else row)
    head = ("Variant", "Against", *_COMPARED, *(["Reported"] if reported else []))
    note = (
        "Differences between trials with the same seed, in percentage points; trials of one seed see the same images "
        "in the same order and begin with the same weights where shapes agree. The 95 % interval is Student's t for "
        "fewer than 10 pairs, beside which the percentile bootstrap, too narrow for few pairs, stands; for 10 and more "
        "the bootstrap counts. p is of a paired t-test of whether the variant is better: near 0 it is, near 1 it is "
        "worse. Where the interval includes 0, the seeds needed are those with which a difference like this one would "
        "be found with probability 0.8 (two-sided, level 0.05) if it is the true one. Several comparisons are made, "
        "and nothing corrects for that."
    )
    if reported:
        note += f" Reported: {manifest.study.source}."
    return Table("Comparisons", head, rows, range(2, len(head)), note)


def _calibration(results: Sequence[VariantResult]) -> Table:
    head = (
        "Variant",
        "ECE (%)",
        "Std. dev.",
        "95 % interval",
        "Difference",
        "Brier score",
        "Std. dev.",
        "95 % interval",
    )
    rows = []
    for each in results:
        (ece, difference), (brier, _) = each.calibration["ece"], each.calibration["brier"]
        change = _signed(difference.mean if difference else None, 100, 2)
        rows.append([each.variant.name, *_summarised(ece, 100, 2), change, *_summarised(brier, 1, 4)])
    note = (
        "Of the last epoch's weights on the test set: expected calibration error over 15 bins of confidence, its "
        "paired difference in percentage points, and the Brier score, summed over the classes. Lower is better."
    )
    return Table("Calibration", head, rows, range(1, 8), note)


def _summarised(known: Summary | None, scale: float, digits: int) -> list[str]:
    if known is None:
        return [NONE] * 3
    interval = _interval(known, known.interval, lambda value: fixed(scale * value, digits))
    deviation = NONE if known.deviation is None else fixed(scale * known.deviation, digits)
    return [fixed(scale * known.mean, digits), deviation, interval]


def _compared(known: Difference | None) -> list[str]:
    if known is None:
        return ["0", *[NONE] * 5]
    intervals = [
        _interval(known, pair, lambda value: _signed(value, 100, 2)) for pair in (known.student, known.bootstrap)
    ]
    p = NONE if known.p is None else f"{known.p:.4f}" if known.p >= 0.0001 else "<0.0001"
    needed = "resolved" if known.is_resolved else _needed(known) if known.deviation else NONE
    return [str(known.n), _signed(known.mean, 100, 2), *intervals, p, needed]


def _interval(known: Summary | Difference, interval: tuple[float, float] | None, shown: Callable[[float], str]) -> str:
    if known.deviation == 0:
        return NO_SPREAD
    return " to ".join(map(shown, interval)) if interval else NONE


def _needed(known: Difference) -> str:
    return f"{known.needed:,}" if known.needed else "more than 10,000"


def _signed(value: float | None, scale: float, digits: int) -> str:
    return NONE if value is None else f"{scale * value:+.{digits}f}"


def write_markdown(folder: Path, manifest: Manifest, results: Sequence[VariantResult]) -> None:
    """Write ``results.md``."""
    parts = [f"# Study {manifest.study.name}", *heading(manifest, results)]
    for i, table in enumerate(tables(manifest, results)):
        parts.append(f"## {table.title}")
        lines = [f"| {' | '.join(map(_cell, table.head))} |"]
        lines.append("|" + "|".join("---:" if j in table.numbers else "---" for j in range(len(table.head))) + "|")
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in table.rows]
        parts += ["\n".join(lines), table.note]
        if i == 0 and any(each.summary for each in results):
            parts.append(f"![Accuracy and differences with intervals]({INTERVALS_FILE})")
            parts.append(f"![Test accuracy along training]({CURVES_FILE})")
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_atomically(folder / MARKDOWN_FILE, text.encode("utf-8", "backslashreplace"))


def _cell(words: str) -> str:
    return escaped(" ".join(words.split())).replace("|", "\\|")
