"""What a study compares: a base recipe and its variants, read from TOML and checked as recipes are.

A file has these keys; ``docs/studies.md`` shows them at work.

``base``
    A recipe: the name of one that comes with rsengine, or the path of a TOML file, from the study's file.
``set``
    What the study changes of the base for all variants, laid out as in a recipe.
``variants``
    By name, what each changes, laid out as in a recipe.
``add``
    Makes the study additive: names of variants, in the order in which they are added, each to all before it. They
    begin with the base, as a variant of the name ``base``, and each is compared with the one before it.
``grid``
    Settings with lists of values: every variant is multiplied by all their combinations.
``baseline``
    The variant with which the others are compared; the first, unless it is said.
``seeds``
    A list, or how many from 0 on; 3 unless it is said.
``budget``
    ``epochs`` or ``images`` of a trial of the base, or ``minutes`` of the whole study (:mod:`rsengine.study.budget`).
``equal``
    ``"epochs"``, or ``"time"``: variants train as long as the baseline, and not as many epochs.
``reported``
    What others have published: ``source``, and by variant the ``accuracy`` in percent or the ``difference`` to the
    variant that it is compared with, in percentage points.
``data``
    The data, as of ``--data``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from rsengine.checked import Field, FieldError, shown
from rsengine.config import Recipe, RecipeError, load_recipe, nearest_match, read_text, unknown_key
from rsengine.data.errors import UserError
from rsengine.text import parse_toml

KEYS = ("name", "comment", "base", "set", "variants", "add", "grid", "baseline", "seeds", "budget", "equal")
KEYS += ("reported", "data")
BASE = "base"
BUDGETS = {"epochs": 100_000, "images": 10**12, "minutes": 10**6}  # and the largest of each
EQUAL = ("epochs", "time")
MOST_TRIALS, MOST_SEEDS = 10_000, 1000
# Of [model], what --model takes from another recipe: the size of the network.
SIZE = ("depth", "blocks", "width_multiplier", "stem_width", "stem_stride", "stem_pool_stride")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,59}")


class StudyError(UserError, ValueError):
    """A study that cannot be run. The message is one line: what, what is allowed, what was given."""


@dataclass(frozen=True)
class Variant:
    """One of the recipes that are compared.

    Attributes:
        recipe: with the variant's name, whatever seed the base has, and the epochs that the file gives.
        changes: what it changes of the base, or in an additive study of the variant before it: ``section.key=value``.
        reference: the variant that it is compared with; None for the baseline.
        accuracy, difference: what was published of it, in percent and in percentage points.
    """

    name: str
    recipe: Recipe
    changes: tuple[str, ...] = ()
    reference: str | None = None
    accuracy: float | None = None
    difference: float | None = None


@dataclass(frozen=True)
class Study:
    """A study as its file says it, and as the options of the command change it. The base's epochs are ``epochs``."""

    name: str
    comment: str
    variants: tuple[Variant, ...]
    baseline: str
    epochs: int
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: tuple[str, float] | None = None
    equal: str = EQUAL[0]
    additive: bool = False
    source: str = ""
    data: str | None = None


@dataclass(frozen=True)
class Changes:
    """What the options of the command change of a study; None leaves what the file says."""

    model: str | None = None
    seeds: str | None = None
    budget: tuple[str, float] | None = None
    data: str | None = None
    set: tuple[str, ...] = field(default=())


def study_names() -> list[str]:
    """The studies that come with rsengine."""
    return sorted(entry.name.removesuffix(".toml") for entry in _shipped().iterdir() if entry.name.endswith(".toml"))


def load_study(name_or_path: str, changes: Changes = Changes()) -> Study:
    """A study that comes with rsengine by its name, or any other by the path of its file.

    Raises:
        StudyError: a key or value that is not allowed, or no such study.
        RecipeError: the same of a recipe in it.
    """
    if name_or_path.lower().endswith(".toml"):
        return parse_study(read_text(name_or_path), name_or_path, Path(name_or_path).parent, changes)
    names = study_names()
    if name_or_path not in names:
        near = nearest_match(name_or_path, names)
        raise StudyError(f"{name_or_path}: expected one of {', '.join(names)}, or a .toml file{near}")
    text = (_shipped() / f"{name_or_path}.toml").read_text("utf-8")
    return parse_study(text, name_or_path, Path(), changes)


def parse_study(text: str, origin: str, folder: Path, changes: Changes = Changes()) -> Study:
    """Parse a study. ``folder``: where the path of its base begins."""
    try:
        values = parse_toml(text)
    except ValueError as error:
        raise StudyError(f"{origin}: not valid TOML: {error}") from error
    try:
        return _study(Field(values), Path(origin).stem, folder, changes)
    except FieldError as error:
        raise StudyError(f"{origin}: {error}") from error
    except (StudyError, RecipeError) as error:
        raise type(error)(f"{origin}: {error}") from error


def parse_seeds(text: str) -> tuple[int, ...]:
    """``5``: from 0 to 4; ``3,7,9``: these. Raises :class:`StudyError`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 11 for part in parts):
        raise StudyError(f"--seeds {text}: expected how many, or a list such as 0,1,2")
    found = [int(part) for part in parts]
    try:
        return _seeds(Field(found[0] if len(parts) == 1 else found, "--seeds"))
    except FieldError as error:
        raise StudyError(str(error)) from error


# --- the parts of a file ----------------------------------------------------------------------------------------------


def _study(values: Field, stem: str, folder: Path, changes: Changes) -> Study:
    _only(values, KEYS)
    name = values["name"].text() if "name" in values else stem
    base = _base(values, folder, changes)
    variants = _variants(values, base)
    names = [variant.name for variant in variants]
    additive = "add" in values
    baseline = names[0]
    if "baseline" in values:
        baseline = _one_of(values["baseline"], names)
    previous = dict(zip(names[1:], names, strict=False))
    variants = [
        replace(each, reference=previous.get(each.name) if additive else baseline if each.name != baseline else None)
        for each in variants
    ]
    variants, source = _with_reported(values, variants)
    seeds = _seeds(values["seeds"]) if "seeds" in values else (0, 1, 2)
    seeds = parse_seeds(changes.seeds) if changes.seeds else seeds
    if len(variants) * len(seeds) > MOST_TRIALS:
        raise StudyError(f"expected at most {MOST_TRIALS:,} trials; got {len(variants) * len(seeds):,}")
    return Study(
        name=_name(values["name"].name if "name" in values else "name", name),
        comment=values["comment"].text().strip() if "comment" in values else "",
        variants=tuple(variants),
        baseline=baseline,
        epochs=base.train.epochs,
        seeds=seeds,
        budget=changes.budget or _budget(values),
        equal=_one_of(values["equal"], EQUAL) if "equal" in values else EQUAL[0],
        additive=additive,
        source=source,
        data=changes.data or (values["data"].text() if "data" in values else None),
    )


def _base(values: Field, folder: Path, changes: Changes) -> Recipe:
    given = values["base"].text() if "base" in values else "quickstart"
    base = load_recipe(str(folder / given) if given.lower().endswith(".toml") else given)
    if "set" in values:
        base = _changed(base, values["set"])
    if changes.model:
        other = load_recipe(changes.model).model
        base = replace(base, model=replace(base.model, **{key: getattr(other, key) for key in SIZE}))
    return replace(base.with_settings(changes.set), name=BASE, comment="")


def _variants(values: Field, base: Recipe) -> list[Variant]:
    given = values["variants"] if "variants" in values else Field({}, "variants")
    names = [_name(f"variants.{name}", name) for name in given.mapping()]
    if "add" in values:
        order = [_one_of(each, names) for each in values["add"].items()]
        if sorted(order) != sorted(names) or not order:
            raise values["add"].error(f"each of {', '.join(names)} once")
        if BASE in names:
            raise StudyError(f"variants.{BASE}: an additive study begins with the base under this name; take another")
        found = [Variant(BASE, base)]
        for name in order:
            found.append(_variant(name, found[-1].recipe, given[name]))
    else:
        found = [_variant(name, base, given[name]) for name in names]
    if "grid" in values:
        found = [each for variant in found or [Variant(BASE, base)] for each in _grid(values["grid"], variant, base)]
    if len(found) < 2:
        raise StudyError("variants: expected two or more, or a grid; got " + (found[0].name if found else "none"))
    return found


def _grid(grid: Field, variant: Variant, base: Recipe) -> Iterable[Variant]:
    """``variant`` with every combination of the values of ``grid``."""
    settings = [
        [(f"{section.name.removeprefix('grid.')}.{key}", item) for item in section[key].items()]
        for section in grid.fields()
        for key in section.mapping()
    ]
    if not settings or not all(settings):
        raise grid.error("settings as in a recipe, each with a list of values")
    for combination in itertools.product(*settings):
        recipe = variant.recipe
        for key, item in combination:
            section, _, name = key.rpartition(".")
            recipe = recipe.with_values({section: {name: item.value}})
        words = ",".join(f"{key.rpartition('.')[2]}={_word(item.value)}" for key, item in combination)
        name = words if variant.name == BASE else f"{variant.name},{words}"
        yield _made(_name("grid", name), recipe, base)


def _variant(name: str, before: Recipe, changes: Field) -> Variant:
    return _made(name, _changed(before, changes), before)


def _made(name: str, recipe: Recipe, before: Recipe) -> Variant:
    flat, plain = recipe.flat(), before.flat()
    changes = tuple(f"{key}={_shown(value)}" for key, value in flat.items() if value != plain[key] and key != "name")
    return Variant(name, replace(recipe, name=name, comment=""), changes)


def _changed(recipe: Recipe, changes: Field) -> Recipe:
    for key in ("name", "comment"):
        if key in changes:
            raise changes[key].error("no name or comment in a variant", "one")
    seed = changes.mapping().get("train")
    if isinstance(seed, Mapping) and "seed" in seed:
        raise StudyError(f"{changes.name}.train.seed: expected none, every variant has those of `seeds`; got one")
    try:
        return recipe.with_values(changes.mapping())
    except RecipeError as error:
        raise RecipeError(f"{changes.name}.{error}") from error


def _with_reported(values: Field, variants: list[Variant]) -> tuple[list[Variant], str]:
    if "reported" not in values:
        return variants, ""
    reported = values["reported"]
    _only(reported, ("source", "accuracy", "difference"))
    for kind, low, high in (("accuracy", 0.0, 100.0), ("difference", -100.0, 100.0)):
        if kind not in reported:
            continue
        _only(reported[kind], [variant.name for variant in variants])
        numbers = {name: reported[kind][name].number(low, high) for name in reported[kind].mapping()}
        variants = [replace(variant, **{kind: numbers.get(variant.name)}) for variant in variants]
    return variants, reported["source"].text()


def _seeds(given: Field) -> tuple[int, ...]:
    if type(given.value) is int:
        return tuple(range(given.integer(1, MOST_SEEDS)))
    seeds = [each.integer(0, 2**31 - 1) for each in given.items()]
    if not seeds or len(seeds) > MOST_SEEDS or len(set(seeds)) < len(seeds):
        raise given.error(f"from 1 to {MOST_SEEDS:,} different seeds")
    return tuple(sorted(seeds))


def _budget(values: Field) -> tuple[str, float] | None:
    if "budget" not in values:
        return None
    budget = values["budget"]
    _only(budget, BUDGETS)
    if len(budget.mapping()) != 1:
        raise budget.error(f"one of {', '.join(BUDGETS)}")
    (kind,) = budget.mapping()
    if kind == "minutes":
        return kind, budget[kind].number(0.001, BUDGETS[kind])
    return kind, budget[kind].integer(1, BUDGETS[kind])


# --- helpers ----------------------------------------------------------------------------------------------------------


def _only(values: Field, known: Iterable[str]) -> None:
    prefix = f"{values.name}." if values.name else ""
    for key in values.mapping():
        if key not in known:
            raise StudyError(unknown_key(prefix + key, [prefix + each for each in known]))


def _one_of(given: Field, choices: Iterable[str]) -> str:
    if given.value not in choices:
        error = given.error(f"one of {', '.join(choices)}")
        raise FieldError(f"{error}{nearest_match(given.value, choices)}")
    return given.value


def _name(where: str, name: str) -> str:
    """``name``, which becomes that of folders."""
    if not _NAME.fullmatch(name):
        expected = "up to 60 letters, digits and ._=,+- with a letter or digit first"
        raise StudyError(f"{where}: expected a name of {expected}; got {shown(name)}")
    return name


def _word(value: Any) -> str:
    words = str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", words).strip("-")


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shipped() -> Any:
    return resources.files("rsengine") / "studies"
