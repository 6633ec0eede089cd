"""How long the trials of a study train: its budget, turned into the epochs of each recipe.

A budget says how long a trial of the base trains. It stretches or shortens every recipe by the same factor: its epochs,
and what is counted in epochs with them, the warm-up, the milestones and the first cycle of restarts. So variants that
differ in their epochs still do, and a schedule keeps its shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rsengine.config import MOST_EPOCHS, Recipe
from rsengine.study.file import Study, StudyError

Measure = Callable[[Sequence[Recipe]], Sequence[float]]  # seconds of an epoch of each recipe, evaluation included


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """``recipe`` with ``factor`` times its epochs, and what is counted in epochs."""
    epochs = min(max(1, round(factor * recipe.train.epochs)), MOST_EPOCHS)
    factor = epochs / recipe.train.epochs  # as whole epochs allow
    schedule = recipe.schedule
    return replace(
        recipe,
        train=replace(recipe.train, epochs=epochs),
        schedule=replace(
            schedule,
            warmup_epochs=min(factor * schedule.warmup_epochs, MOST_EPOCHS),
            restart_epochs=min(max(0.001, factor * schedule.restart_epochs), MOST_EPOCHS),
            milestones=tuple(sorted({max(1, round(factor * milestone)) for milestone in schedule.milestones})),
        ),
    )


def planned(study: Study, train_images: int, workers: int, measure: Measure) -> dict[str, Recipe]:
    """The recipe of each variant at the study's budget, by name.

    Args:
        train_images: of the data set.
        workers: trials at a time.
        measure: called if the budget or the study is about time.

    Raises:
        StudyError: so few minutes that no trial has an epoch.
    """
    kind, amount = study.budget or ("epochs", study.epochs)
    recipes = {variant.name: variant.recipe for variant in study.variants}
    weights = dict.fromkeys(recipes, 1.0)  # how many times the base's epochs a variant's are, beside its recipe's
    seconds: Mapping[str, float] = {}
    if kind == "minutes" or study.equal == "time":
        seconds = dict(zip(recipes, measure(list(recipes.values())), strict=True))
    if study.equal == "time":
        weights = {name: seconds[study.baseline] / seconds[name] for name in recipes}
    if kind == "epochs":
        factor = amount / study.epochs
    elif kind == "images":
        limit = max(recipe.train.limit_train_batches * recipe.train.batch_size for recipe in recipes.values())
        factor = amount / (min(limit or train_images, train_images) * study.epochs)
    else:
        each = {name: weights[name] * recipe.train.epochs * seconds[name] for name, recipe in recipes.items()}
        factor = _fitting(study, each, 60 * amount * workers / len(study.seeds))
    return {name: scaled(recipe, factor * weights[name]) for name, recipe in recipes.items()}


def _fitting(study: Study, seconds: Mapping[str, float], limit: float) -> float:
    """The factor with which one trial of every variant, of so many ``seconds`` at factor 1, fits into ``limit``; a
    whole number of the base's epochs."""
    epochs = math.floor(limit / sum(seconds.values()) * study.epochs + 1e-9)
    if epochs < 1:
        needed = sum(seconds.values()) / study.epochs * len(study.seeds) / 60
        raise StudyError(
            f"budget.minutes: an epoch of every trial takes about {needed:.1f} minutes here on one worker; ask for "
            "more minutes, fewer seeds (--seeds) or a smaller network (--model)"
        )
    return epochs / study.epochs
