"""``report.html``: the page about a run, written from its log, its last evaluation and its recipe."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rsengine.config import Recipe
from rsengine.engine.evaluation import Evaluation
from rsengine.run.augmented import Examples
from rsengine.run.files import METRICS_FILE, PAGE_FILE, write_atomically
from rsengine.run.formats import NONE, count, number, percent
from rsengine.run.log import EPOCH, INTERVAL, START, RunLog
from rsengine.run.mistakes import Mistake
from rsengine.run.page import (
    LIMIT,
    TOOLS,
    Chart,
    Line,
    Markup,
    Section,
    details,
    document,
    facts,
    joined,
    note,
    picture,
    preformatted,
    scrolled,
    shortened,
    table,
    tag,
)
from rsengine.run.page_classes import calibration, class_table, confusion_matrix, mistakes, wilson
from rsengine.run.progress import duration
from rsengine.run.report import EPOCH_COLUMNS, machine_rows, speed_rows, thinned
from rsengine.text import parse_toml

Records = list[dict[str, Any]]


def write_page(
    folder: Path,
    *,
    recipe_toml: str,
    title: str,
    dataset_line: str,
    model_lines: Sequence[str],
    classes: Sequence[str],
    notes: Sequence[str],
    again: Sequence[str],
    planned_epochs: int,
    result: Mapping[str, Evaluation],
    worst: Sequence[Mistake] = (),
    examples: Examples | None = None,
) -> None:
    """Write ``report.html`` into a run folder, replacing an older one atomically. It has at most 2 MB.

    What the folder's log lacks, as that of an older version may, the page leaves out.

    Args:
        dataset_line, model_lines, notes: lines of text.
        classes: the C class names.
        again: command lines that repeat and use the run.
        planned_epochs: epochs the recipe asks for.
        result: of the last evaluation, by weights (``raw``, ``ema``), with or without predictions; may be empty.
        worst: the most confident mistakes, of the ``ema`` weights if there are any.
        examples: training images before and after augmentation.

    Raises:
        LogError: the log is damaged.
        WriteError: the disk refuses it.
    """
    log = RunLog(folder)
    starts, intervals, epochs = (log.records(kind) for kind in (START, INTERVAL, EPOCH))
    weights = "ema" if "ema" in result else "raw"
    final = result.get(weights)

    top = list(_result(epochs, intervals, final, weights, planned_epochs))
    curves = [] if not (epochs or intervals) else [TOOLS, *_curves(epochs, intervals), *_epoch_table(epochs)]
    sections = [
        Section("run", "The run", [facts(_run_rows(starts, intervals, epochs, dataset_line, model_lines, notes))]),
        Section("curves", "Training", curves),
    ]
    if final is not None:
        sections += [
            Section("confusion", "Confusion matrix", [*confusion_matrix(final.confusion, classes)]),
            Section("classes", "Classes", [*class_table(final.confusion, classes)]),
        ]
    if final is not None and final.predictions is not None:
        sections += [
            Section("mistakes", "The most confident mistakes", [*mistakes(worst, classes)]),
            Section("calibration", "Calibration", [*calibration(final.predictions.calibration())]),
        ]
    if examples is not None:
        sections.append(Section("augmentation", "What the network is shown", [*_examples(examples, classes)]))
    sections += [
        Section("time", "Where the time went", [*_time(intervals, epochs)]),
        Section("recipe", "Recipe", [*_recipe(recipe_toml)]),
        Section("machine", "Machine and versions", [_machine(starts)]),
        Section("again", "How to run it again", [preformatted("\n".join(again))]),
    ]
    page = document(title, top, [section for section in sections if section.content])
    if len(page) > LIMIT:  # pictures first: the numbers are what the page is for
        left_out = {"mistakes", "augmentation"}
        top.append(note("Left out, because the page would exceed 2 MB: mistakes and augmented images."))
        page = document(title, top, [each for each in sections if each.content and each.anchor not in left_out])
    write_atomically(folder / PAGE_FILE, page)


def _result(
    epochs: Records, intervals: Records, final: Evaluation | None, weights: str, planned: int
) -> Iterator[Markup]:
    done = max((record["epoch"] for record in epochs), default=0)
    if done < planned:
        yield tag(
            "p",
            tag("b", "Unfinished run: "),
            f"{done} of {planned} planned epochs are done. What follows is how far it came, not the recipe's result. "
            "Mistakes and calibration are measured at the end of a run.",
            class_="warning",
        )
    cards = []
    for name, field in (("EMA weights", "test_accuracy_ema"), ("raw weights", "test_accuracy")):
        tested = [record for record in epochs if number(record[field]) is not None]
        if tested:
            last = tested[-1]
            error = standard_error(last[field], last.get("test_images") or (final and final.images))
            words = f"test accuracy, {name}, after epoch {last['epoch']}"
            cards.append((f"{percent(last[field])}{error}", words))
    if epochs:
        cards.append((duration(epochs[-1]["seconds"]), "training and evaluation"))
    if intervals:
        cards.append((count(statistics.median(r["images_per_second"] for r in intervals)), "images/s, median"))
    yield tag("div", *(tag("div", tag("strong", a), tag("span", b)) for a, b in cards), class_="headline")
    if not epochs:
        yield note("Not evaluated yet.")
        return
    words = (
        "± is the standard error that the test images alone leave. One run, n = 1: no spread over seeds is "
        "measured here. The result is the last epoch's, because nothing about the test set had a part in choosing it."
    )
    if final is not None and final.images:
        low, high = wilson(final.accuracy, final.images)
        words += (
            f" 95 % confidence interval of the {weights.upper() if weights == 'ema' else weights} weights over the "
            f"{final.images:,} test images: {percent(low)} to {percent(high)} (Wilson)."
        )
    yield note(words)


def standard_error(accuracy: float, images: Any) -> str:
    """What so many test images leave uncertain of an accuracy, as `` ± 0.40`` in percentage points."""
    if not number(images):
        return ""
    return f" ± {100 * math.sqrt(accuracy * (1 - accuracy) / images):.2f}"


def _run_rows(
    starts: Records,
    intervals: Records,
    epochs: Records,
    dataset_line: str,
    model_lines: Sequence[str],
    notes: Sequence[str],
) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [("Data", dataset_line), *(("Model", line) for line in model_lines)]
    for name, field in (("EMA", "test_accuracy_ema"), ("raw", "test_accuracy")):
        tested = [record for record in epochs if number(record[field]) is not None]
        if tested:
            best = max(tested, key=lambda record: record[field])
            words = f"{percent(best[field])} after epoch {best['epoch']}; optimistic, because chosen by it"
            rows.append((f"Best test accuracy, {name} weights", words))
    return [*rows, *speed_rows(starts, intervals, epochs), *(("Note", _code(line)) for line in notes)]


def _code(line: str) -> Markup:
    """A line with `code` in backquotes."""
    return joined(tag("code", part) if i % 2 else part for i, part in enumerate(line.split("`")))


def _curves(epochs: Records, intervals: Records) -> Iterator[Chart]:
    def line(name: str, colour: str, records: Records, field: str, scale: float = 1.0, **how: Any) -> list[Line]:
        points = [
            (record["epoch"], scale * record[field]) for record in records if number(record.get(field)) is not None
        ]
        return [Line(name, colour, points, **how)] if points else []

    for title, field, scale, unit in (("Accuracy (%)", "accuracy", 100.0, " %"), ("Loss", "loss", 1.0, "")):
        lines = [
            *line("train, each interval", "green", intervals, f"train_{field}", scale, faint=True),
            *line("train", "green", epochs, f"train_{field}", scale, dash="6 3"),
            *line("test, raw weights", "vermilion", epochs, f"test_{field}", scale),
            *line("test, EMA weights", "blue", epochs, f"test_{field}_ema", scale),
        ]
        yield Chart(title, lines, unit)
    yield Chart("Learning rate", line("learning rate", "purple", intervals or epochs, "learning_rate"), zero=True)


def _epoch_table(epochs: Records) -> list[Markup]:
    if not epochs:
        return []
    shown, stride = thinned(epochs)
    rows = [[cell(record) for _, cell in EPOCH_COLUMNS] for record in shown]
    content = [table([name for name, _ in EPOCH_COLUMNS], rows, numbers=range(len(EPOCH_COLUMNS)))]
    if stride > 1:
        content.insert(0, note(f"Every {stride}th epoch, the first and the last; {METRICS_FILE} has them all."))
    return [details("Table of epochs", *content)]


def _examples(examples: Examples, classes: Sequence[str]) -> Iterator[Markup]:
    yield note(
        "Training images, spread over the set, and what the recipe's augmentation makes of them in the first epochs."
    )
    heads = [tag("th", shortened(classes[label], 24), scope="col") for label in examples.labels]
    lines = []
    for name, images, captions in examples.rows:
        cells = []
        for i, pixels in enumerate(images):
            words = captions[i].split("\n") if captions else []
            below = joined(piece for word in words for piece in (word, Markup("<br>")))
            cells.append(tag("td", picture(pixels, f"{classes[examples.labels[i]]}, {name}"), below))
        lines.append(tag("tr", tag("th", name, scope="row"), *cells))
    content = [tag("thead", tag("tr", tag("td"), *heads)), tag("tbody", *lines)]
    yield scrolled(tag("table", *content, class_="shown"), "Augmented images")


def _time(intervals: Records, epochs: Records) -> Iterator[Markup | Chart]:
    total = max((record["seconds"] for record in (*epochs[-1:], *intervals[-1:])), default=0.0)
    evaluation = sum(record["eval_seconds"] for record in epochs)
    waits = [number(record.get("loader_seconds")) for record in intervals]
    parts: list[tuple[str, float]] = []
    if waits and None not in waits:
        loader = min(math.fsum(waits), total - evaluation)
        parts += [("training steps", total - evaluation - loader), ("waiting for the loader", loader)]
    else:
        parts.append(("training steps and loader", total - evaluation))
    parts.append(("evaluation", evaluation))
    saving = [number(record.get("checkpoint_seconds")) for record in intervals]
    if saving and None not in saving:
        parts.append(("checkpoints, without the last", math.fsum(saving)))
    parts = [(name, max(0.0, seconds)) for name, seconds in parts]
    everything = math.fsum(seconds for _, seconds in parts)
    if everything > 0:
        bars = [
            tag(
                "i",
                class_=f"c{i}",
                style=f"width:{100 * seconds / everything:.3f}%",
                title=f"{name}: {duration(seconds)}",
            )
            for i, (name, seconds) in enumerate(parts)
        ]
        yield tag("div", *bars, class_="parts", role="img", aria_label="Shares of the time, as in the table below")
        rows = [
            (joined([tag("i", class_=f"dot c{i}"), name]), duration(seconds), percent(seconds / everything, 1))
            for i, (name, seconds) in enumerate(parts)
        ]
        yield table(("", "Time", "Share"), rows, numbers=(1, 2))
        yield note("As the training loop sees it: on a GPU it waits for batches while the device computes.")
    points = [(record["epoch"], record["images_per_second"]) for record in intervals]
    if points:
        yield Chart("Images per second", [Line("images/s", "blue", points)], zero=True)


def flat(recipe_toml: str) -> dict[str, Any]:
    """The settings of a recipe as ``section.key``. Raises ValueError if it is not TOML."""
    found: dict[str, Any] = {}
    for name, value in parse_toml(recipe_toml).items():
        found |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return found


def setting(value: Any) -> str:
    """A value of a recipe as its file has it, shortened."""
    if value is None:
        return NONE
    words = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
    return shortened(words, 200)


def _recipe(recipe_toml: str) -> Iterator[Markup]:
    mine, defaults = flat(recipe_toml), flat(Recipe().to_toml())
    head = ("Setting", "Value", "Default")
    rows = [(key, tag("code", setting(value)), tag("code", setting(defaults.get(key)))) for key, value in mine.items()]
    changed = [i for i, (key, value) in enumerate(mine.items()) if value != defaults.get(key)]
    yield tag("p", f"{len(changed)} of {len(rows)} settings differ from their defaults.")
    if changed:
        yield table(head, [rows[i] for i in changed], marked=range(len(changed)))
    yield details(f"All {len(rows)} settings, those that differ marked", table(head, rows, marked=changed))


def _machine(starts: Records) -> Markup:
    return facts(machine_rows(starts)) if starts else note("The log has lost what it said of them.")
