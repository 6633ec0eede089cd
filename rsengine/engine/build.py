"""From a recipe to what runs it."""

from __future__ import annotations

from dataclasses import asdict

from rsengine.config import Recipe
from rsengine.model import ResNetRS, resnet_rs


def build_model(recipe: Recipe, num_classes: int) -> ResNetRS:
    """The network a recipe describes."""
    options = asdict(recipe.model)
    return resnet_rs(num_classes=num_classes, **(options | {"blocks": options["blocks"] or None}))
