"""The fill colours of recipes."""

from __future__ import annotations

from collections.abc import Sequence

FILLS = ("zero", "mean")  # as recipes name them; the data set's mean becomes 0 once normalised


def fill_colour(fill: str, mean: Sequence[float]) -> tuple[int, ...]:
    """The uint8 colour of ``fill``, one of :data:`FILLS`. ``mean``: of the data set, 0 to 1."""
    return (0, 0, 0) if fill == "zero" else tuple(round(255 * channel) for channel in mean)
