"""``study.json``: what the trials in a study's folder have in common, so that others are not mixed with them."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from rsengine.checked import Field, FieldError
from rsengine.config import Recipe, RecipeError
from rsengine.data import Dataset, identity_of
from rsengine.run.files import METRICS_FILE, write_atomically
from rsengine.study.file import Study, StudyError, Variant
from rsengine.study.trials import RECIPES, TRIALS, Trial

MANIFEST_FILE = "study.json"
_VERSION = 1
_SOURCES = {".py", ".c", ".h"}
_NOT_TRAINING = ("study",)  # folders of the package that no result depends on


@dataclass(frozen=True)
class Manifest:
    """A study with the recipes that its trials train with, and what they were made with.

    Attributes:
        recipes: by variant, at the study's budget.
        data: ``name``, ``identity``, and how many images.
        source: of the code, see :func:`source_version`.
    """

    study: Study
    recipes: Mapping[str, Recipe]
    data: Mapping[str, Any]
    source: str

    def trials(self, folder: Path) -> list[Trial]:
        """All trials, seed by seed: a study that is stopped has compared all its variants with some seeds."""
        return [
            Trial(name, seed, replace(recipe, train=replace(recipe.train, seed=seed)), folder)
            for seed in self.study.seeds
            for name, recipe in self.recipes.items()
        ]


@functools.cache
def source_version() -> str:
    """What decides a trial beside recipe, data and machine: a digest of rsengine's code, and versions."""
    package = Path(str(resources.files("rsengine")))
    total = hashlib.sha256()
    for top in (package, package / "kernels", package / "data"):  # the last two may be links, which rglob leaves out
        for path in sorted(each for each in top.rglob("*") if each.suffix in _SOURCES):
            name = path.relative_to(package)
            if name.parts[0] not in _NOT_TRAINING:
                total.update(name.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    torch = importlib.metadata.version("torch")
    return f"rsengine {total.hexdigest()[:12]}, PyTorch {torch}, Python {platform.python_version()}"


def open_manifest(
    folder: Path,
    study: Study,
    dataset: Dataset,
    plan: Callable[[], Mapping[str, Recipe]],
    *,
    accept_code: bool,
    say: Callable[[str], None],
) -> Manifest:
    """The manifest of the study in ``folder``, which must fit what is asked for; or a new one, and the recipes with it.

    Seeds are added to those that the folder has.

    Args:
        plan: finds the recipes at the study's budget, called for a new study alone.
        accept_code: go on with trials of other code.

    Raises:
        StudyError: the folder has trials of other recipes, data or code, or something else in it.
    """
    data = {
        "name": dataset.name,
        "identity": identity_of(dataset),
        "train_images": dataset.train_count,
        "test_images": dataset.test_count,
    }
    path = folder / MANIFEST_FILE
    if path.is_file():
        known = read_manifest(folder)
        _refuse_other(folder, known, study, data)
        if known.source != source_version():
            if not accept_code:
                raise StudyError(
                    f"{folder}: its trials were made with other code ({known.source}) than this ({source_version()}); "
                    "name another folder with --out, or go on with --accept-code, which the results will say"
                )
            say(f"study: going on with trials of other code ({known.source}), as --accept-code allows")
        seeds = tuple(sorted({*known.study.seeds, *study.seeds}))
        manifest = replace(known, study=replace(study, seeds=seeds))
    else:
        if (folder / TRIALS).exists():
            raise StudyError(f"{folder}: has {TRIALS}/ without a {MANIFEST_FILE}; name another folder with --out")
        if (folder / METRICS_FILE).exists():
            raise StudyError(f"{folder}: is the folder of a run, not of a study; name another one with --out")
        manifest = Manifest(study, plan(), data, source_version())
    (folder / TRIALS).mkdir(parents=True, exist_ok=True)
    (folder / RECIPES).mkdir(exist_ok=True)
    for name, recipe in manifest.recipes.items():
        write_atomically(folder / RECIPES / f"{name}.toml", recipe.to_toml().encode())
    write_atomically(path, _to_json(manifest))  # last: with it the folder is a study's
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Raises :class:`StudyError` where there is none, or a damaged one."""
    path = folder / MANIFEST_FILE
    try:
        values = Field.of_json(path.read_bytes())
        values["version"].integer(_VERSION, _VERSION)
        study = values["study"].mapping()
        variants = tuple(
            Variant(**each.mapping() | {"recipe": _recipe(each["recipe"]), "changes": tuple(each["changes"].value)})
            for each in values["study"]["variants"].items()
        )
        budget = tuple(study["budget"]) if study["budget"] else None
        study = Study(**study | {"variants": variants, "seeds": tuple(study["seeds"]), "budget": budget})
        recipes = {name: _recipe(values["recipes"][name]) for name in values["recipes"].mapping()}
        return Manifest(study, recipes, values["data"].mapping(), values["source"].text())
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}); name the folder of a study") from error
    except (FieldError, RecipeError, KeyError, TypeError) as error:
        raise StudyError(f"{path}: damaged ({error}); name another folder with --out") from error


def _recipe(field: Field) -> Recipe:
    return Recipe.from_toml(field.text(), field.name)


def _to_json(manifest: Manifest) -> bytes:
    study = asdict(manifest.study)
    study["variants"] = [asdict(each) | {"recipe": each.recipe.to_toml()} for each in manifest.study.variants]
    content = {
        "version": _VERSION,
        "study": study,
        "recipes": {name: recipe.to_toml() for name, recipe in manifest.recipes.items()},
        "data": dict(manifest.data),
        "source": manifest.source,
    }
    return (json.dumps(content, indent=1) + "\n").encode()


def _refuse_other(folder: Path, known: Manifest, study: Study, data: Mapping[str, Any]) -> None:
    """Raise :class:`StudyError` unless ``study`` on ``data`` would make the trials that the folder has."""

    def refuse(what: str) -> None:
        raise StudyError(f"{folder}: its trials are of {what}; name another folder with --out")

    if known.data["identity"] != data["identity"]:
        counts = [
            f"{each['name']}, {each['train_images']:,} + {each['test_images']:,} images" for each in (known.data, data)
        ]
        refuse(f"other data ({counts[0]}, identity {known.data['identity'][:8]}…) than these ({counts[1]})")
    before, now = ({each.name: each for each in one.variants} for one in (known.study, study))
    if before.keys() != now.keys():
        refuse(f"other variants ({', '.join(before)}) than these ({', '.join(now)})")
    for name, variant in now.items():
        if differences := before[name].recipe.differences(variant.recipe):
            refuse(f"another recipe (variant {name}, {differences[0]})".replace(" against ", " there, here "))
    for key in ("budget", "equal", "epochs"):
        if getattr(known.study, key) != getattr(study, key):
            there, here = (_spelled(getattr(one, key)) for one in (known.study, study))
            refuse(f"another budget ({key} {there} there, here {here})")


def _spelled(value: object) -> str:
    """A setting of the budget, as its file or its options have it."""
    return " = ".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)
