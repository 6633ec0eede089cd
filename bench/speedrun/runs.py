"""The finished runs in docs/speedrun.md: ``attempts.jsonl`` and ``test_set.jsonl`` beside this module.

The first line of a file is ``{"base": …}``, a whole recipe laid out as in TOML. Each line after it is a run: its
``name``; its ``recipe``, only what differs from the base, or null where another engine made the run; and its
``records``, every line of the ``metrics.jsonl`` that it wrote (:mod:`rsengine.run.log`), without the data's folder.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsengine.config import Recipe
from rsengine.run.files import RECIPE_FILE, write_atomically
from rsengine.run.log import EPOCH, RunLog, accuracy

ATTEMPTS, TEST_SET = (Path(__file__).with_name(f"{name}.jsonl") for name in ("attempts", "test_set"))


@dataclass(frozen=True)
class Run:
    """One run: its name, its recipe where rsengine made it, and the records of its log."""

    name: str
    recipe: Recipe | None
    records: Sequence[Mapping[str, Any]]

    @property
    def epochs(self) -> list[Mapping[str, Any]]:
        """The records of its evaluated epochs."""
        return [record for record in self.records if record["kind"] == EPOCH]

    @property
    def accuracy(self) -> float:
        """The accuracy at the end."""
        return accuracy(self.epochs[-1])

    @property
    def minutes(self) -> float:
        """Minutes of training and evaluation."""
        return self.epochs[-1]["seconds"] / 60

    @property
    def training_minutes(self) -> float:
        """Minutes of training alone."""
        return sum(record["epoch_seconds"] for record in self.epochs) / 60

    def after(self, minutes: float) -> float | None:
        """The accuracy at the last evaluation within ``minutes`` of training and evaluation; None where there was no
        evaluation yet, or where the run had ended more than an epoch before."""
        seconds = 60 * minutes
        done = [record for record in self.epochs if record["seconds"] <= seconds]
        longest = max(record["epoch_seconds"] + record["eval_seconds"] for record in self.epochs)
        if not done or self.epochs[-1]["seconds"] + longest < seconds:
            return None
        return accuracy(done[-1])


def by_recipe(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone, under the name that they share."""
    recipes: dict[str, list[Run]] = {}
    for run in runs:
        recipes.setdefault(re.sub(r"-seed\d+$", "", run.name), []).append(run)
    return recipes


def read(folder: Path) -> Run:
    """The run in ``folder``, under the folder's name."""
    recipe = folder / RECIPE_FILE
    return Run(
        folder.resolve().name,
        Recipe.from_toml(recipe.read_text(encoding="utf-8"), str(recipe)) if recipe.exists() else None,
        RunLog(folder).records(),
    )


def load(path: Path) -> list[Run]:
    """The runs in a file, by name; none where there is no file yet."""
    return _load(path)[1]


def add(run: Run, path: Path) -> None:
    """Add a run to a file; one of the same name gives way to it."""
    base, runs = _load(path)
    base = base or run.recipe or Recipe()
    kept = {run.name: run for run in runs} | {run.name: run}
    lines: list[dict[str, Any]] = [{"base": _values(base)}]
    for name in sorted(kept):
        recipe = kept[name].recipe
        differences = None if recipe is None else _differences(_values(recipe), _values(base))
        lines.append({"name": name, "recipe": differences, "records": list(map(_portable, kept[name].records))})
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    write_atomically(path, text.encode())


def _portable(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """``record`` without the folder of the data, which is one of the machine where the run was made."""
    if "data" not in record:
        return record
    return {**record, "data": {key: value for key, value in record["data"].items() if key != "folder"}}


def _load(path: Path) -> tuple[Recipe | None, list[Run]]:
    if not path.exists():
        return None, []
    first, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    base = Recipe().with_values(first["base"])
    return base, [
        Run(line["name"], None if line["recipe"] is None else base.with_values(line["recipe"]), line["records"])
        for line in lines
    ]


def _values(recipe: Recipe) -> dict[str, Any]:
    return tomllib.loads(recipe.to_toml())


def _differences(values: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _differences(value, base[key]) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value != base[key]
    }
