"""Learning rate and EMA decay as tables over the optimiser steps of a run, image sizes over its epochs.

Pure functions: no state, no torch. A table can be checked value by value, drawn before a run, and put on a device
where a step reads it by its own counter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rsengine.errors import SettingsError
from rsengine.output import counted

SCHEDULES = ("cosine", "cosine_restarts", "multistep", "one_cycle", "constant")
MOST_STEPS = 20_000_000  # of a run: each has an entry in tables of float64


def learning_rate_table(
    name: str,
    *,
    learning_rate: float,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0.0,
    final_fraction: float = 0.0,
    restart_epochs: float = 50.0,
    restart_multiplier: float = 1.0,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    start_fraction: float = 0.04,
    peak_fraction: float = 0.3,
) -> np.ndarray:
    """The learning rate of every optimiser step.

    The first ``warmup_epochs`` rise linearly, reaching the schedule's first value with the last warm-up step. The shape
    follows; ``e`` below is the epochs since the warm-up, a fraction, ``E`` their number, ``lr`` the ``learning_rate``:

    - ``cosine``: lr (f + (1 - f) (1 + cos(pi e / E)) / 2), f = ``final_fraction`` (Loshchilov & Hutter, 1608.03983)
    - ``cosine_restarts``: the same over cycles of T0 = ``restart_epochs``, each ``restart_multiplier`` times the last,
      falling to 0; the first step of a cycle is at the full rate
    - ``multistep``: lr gamma^k, k = how many ``milestones`` (epochs, counted from the start of the run) have begun
    - ``one_cycle``: linear from ``start_fraction`` lr to lr at ``peak_fraction`` E, then linear to f lr at the end
      (Smith & Topin, 1708.07120)
    - ``constant``: lr

    Returns:
        float64 (epochs * steps_per_epoch,).

    Raises:
        ValueError: an unknown name, or a warm-up that leaves no step.
    """
    if name not in SCHEDULES:
        raise ValueError(f"name: expected one of {', '.join(SCHEDULES)}; got {name!r}")
    if epochs < 1 or steps_per_epoch < 1:
        raise ValueError(f"epochs, steps_per_epoch: expected at least 1; got {epochs}, {steps_per_epoch}")
    total = epochs * steps_per_epoch
    if total > MOST_STEPS:
        length = f"{counted(epochs, 'epoch')} of {counted(steps_per_epoch, 'step')}"
        raise SettingsError(f"train.epochs: {length} are more than {MOST_STEPS:,} steps; ask for fewer")
    warmup = round(warmup_epochs * steps_per_epoch)
    if not 0 <= warmup < total:
        raise SettingsError(
            f"warmup_epochs: expected fewer than the run's {counted(epochs, 'epoch')}; got {warmup_epochs:g}"
        )

    steps = np.arange(total - warmup, dtype=np.float64)
    progress = steps / (total - warmup)
    if name == "cosine":
        shape = final_fraction + (1 - final_fraction) * _half_cosine(progress)
    elif name == "cosine_restarts":
        shape = _half_cosine(_cycle_position(steps / steps_per_epoch, restart_epochs, restart_multiplier))
    elif name == "multistep":
        epoch = (steps + warmup) // steps_per_epoch
        shape = gamma ** np.searchsorted(np.sort(milestones), epoch, side="right").astype(np.float64)
    elif name == "one_cycle":
        # The last step is the end of the fall: with `progress` it would stop one step above it.
        position = steps / max(total - warmup - 1, 1)
        shape = np.interp(position, [0.0, peak_fraction, 1.0], [start_fraction, 1.0, final_fraction])
    else:
        shape = np.ones_like(steps)
    rise = shape[0] * np.arange(1, warmup + 1) / max(warmup, 1)
    return learning_rate * np.concatenate([rise, shape])


def ema_decay_table(decay: float, steps: int, *, warmup: bool = True) -> np.ndarray:
    """The EMA decay of every step n = 0, 1, ...: ``min(decay, (1 + n) / (10 + n))`` with ``warmup``, else constant.

    The warm-up keeps the EMA of a short run from being dominated by the random initialisation.

    Returns:
        float64 (steps,).
    """
    n = np.arange(steps, dtype=np.float64)
    return np.minimum(decay, (1 + n) / (10 + n)) if warmup else np.full(steps, float(decay))


def image_size_table(
    full: tuple[int, int], epochs: int, *, start_scale: float, full_from: float
) -> list[tuple[int, int]]:
    """The height and width of training images in every epoch: progressive resizing (Howard et al., fast.ai, 2018).

    Sides grow linearly with the epochs from ``start_scale`` of ``full`` to all of it at ``full_from`` of the run, in
    multiples of eight pixels, rounded down, so that a network can halve them three times without a remainder.
    """
    sizes = []
    for epoch in range(epochs):
        progress = epoch / (full_from * epochs) if full_from else 1.0
        scale = start_scale + (1 - start_scale) * progress
        sizes.append(full if scale >= 1 else tuple(max(8, int(side * scale) // 8 * 8) for side in full))
    return sizes


def _half_cosine(progress: np.ndarray) -> np.ndarray:
    """1 at 0, 0 at 1."""
    return (1 + np.cos(np.pi * progress)) / 2


def _cycle_position(epoch: np.ndarray, first: float, multiplier: float) -> np.ndarray:
    """Where in its cycle each (fractional) epoch lies, in [0, 1)."""
    starts, length = [0.0], first
    while starts[-1] + length <= epoch[-1]:
        starts.append(starts[-1] + length)
        length *= multiplier
    bounds = np.array([*starts, starts[-1] + length])
    cycle = np.searchsorted(bounds, epoch, side="right") - 1
    return (epoch - bounds[cycle]) / (bounds[cycle + 1] - bounds[cycle])
