"""``results.html``: the results of a study on one page, in the style of a run's report."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from rsengine.run.files import write_atomically
from rsengine.run.formats import NONE
from rsengine.run.page import (
    COLOURS,
    TOOLS,
    Chart,
    Line,
    Markup,
    Section,
    details,
    document,
    facts,
    image_tag,
    note,
    preformatted,
    table,
    tag,
)
from rsengine.run.progress import duration
from rsengine.study.manifest import Manifest
from rsengine.study.pictures import CURVES_FILE, INTERVALS_FILE, curve
from rsengine.study.results import PAGE_FILE, VariantResult
from rsengine.study.tables import Table, heading, tables

_DASHES = ("", "7 3", "2 3", "9 3 2 3")


def write_page(folder: Path, manifest: Manifest, results: Sequence[VariantResult]) -> None:
    """Write ``results.html``. The pictures are there already."""
    shown = list(tables(manifest, results))
    sections = [Section("results", "Results", [*_table(shown[0]), *_picture(folder, INTERVALS_FILE, results)])]
    for each in shown[1:]:
        sections.append(Section(each.title.lower().replace(" ", "-").replace(",", ""), each.title, list(_table(each))))
    curves = [*_picture(folder, CURVES_FILE, results), TOOLS, *_charts(results)]
    sections.insert(2 if len(shown) > 1 else 1, Section("curves", "Curves", curves))
    sections.append(Section("time", "Time", list(_time(results))))
    sections.append(Section("recipes", "Recipes", list(_recipes(manifest))))
    top = [tag("p", line) for line in heading(manifest, results)]
    write_atomically(folder / PAGE_FILE, document(f"Study {manifest.study.name}", top, sections))


def _table(shown: Table) -> Iterator[Markup]:
    yield table(shown.head, shown.rows, numbers=shown.numbers)
    if shown.note:
        yield note(shown.note)


def _picture(folder: Path, name: str, results: Sequence[VariantResult]) -> Iterator[Markup]:
    if any(each.summary for each in results):
        words = "Test accuracy along training" if name == CURVES_FILE else "Results with their intervals"
        yield tag("p", image_tag((folder / name).read_bytes(), "png", words, style="max-width:100%;height:auto"))


def _charts(results: Sequence[VariantResult]) -> Iterator[Chart]:
    for title, key in (("EMA weights", "test_accuracy_ema"), ("raw weights", "test_accuracy")):
        lines = []
        for i, each in enumerate(results):
            points = [
                (epoch, 100 * statistics.fmean(values))
                for epoch, values in curve(each, lambda record, key=key: record.get(key))
            ]
            if points:
                colour, dash = COLOURS[i % len(COLOURS)], _DASHES[i // len(COLOURS) % len(_DASHES)]
                lines.append(Line(each.variant.name, colour, points, dash))
        if lines:
            yield Chart(f"Mean test accuracy (%), {title}", lines, " %")


def _time(results: Sequence[VariantResult]) -> Iterator[Markup]:
    rows = []
    for each in results:
        seconds = [trial.epochs[-1]["seconds"] for trial in each.trials if trial.is_done]
        rows.append((each.variant.name, len(seconds), duration(statistics.fmean(seconds)) if seconds else NONE))
    yield table(("Variant", "Trials", "Mean time"), rows, numbers=(1, 2))
    yield note("Of training and evaluation, as measured; several workers slow each other down.")


def _recipes(manifest: Manifest) -> Iterator[Markup]:
    rows = [(each.name, ", ".join(each.changes) or NONE) for each in manifest.study.variants]
    yield facts(rows)
    for name, recipe in manifest.recipes.items():
        yield details(name, preformatted(recipe.to_toml()))
