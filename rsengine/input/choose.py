"""Which loader makes the batches, and why: FFCV where it can be used, rsengine's own stream elsewhere."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

from rsengine.errors import SettingsError
from rsengine.input.loader import BetonLoader

HIDE_FFCV = "RSENGINE_NO_FFCV"  # a variable: 1 makes FFCV count as not installed


@dataclass(frozen=True)
class LoaderChoice:
    """A class of loaders, which ``open`` makes one of, and a phrase on the choice."""

    open: type[BetonLoader]
    reason: str


def choose_loader(wanted: str) -> LoaderChoice:
    """Settle ``wanted``: auto, ffcv or stream, as recipes name them.

    Raises:
        SettingsError: ``ffcv`` where it cannot be used, with what to use instead.
    """
    problem = None if wanted == "stream" else ffcv_problem()
    if wanted == "ffcv" and problem:
        raise SettingsError(f"train.loader: 'ffcv' cannot be used: {problem}; install FFCV or use train.loader=stream")
    why = "as asked" if wanted != "auto" else f"automatic: {problem or 'FFCV is installed'}"
    if wanted == "stream" or problem:
        from rsengine.input.stream import StreamLoader

        return LoaderChoice(StreamLoader, f"batches from rsengine's own stream ({why})")
    from rsengine.input.ffcv_loader import FfcvLoader

    return LoaderChoice(FfcvLoader, f"batches through FFCV ({why})")


def ffcv_problem() -> str | None:
    """Why FFCV cannot be used here; None if it can, and it is then imported."""
    if os.environ.get(HIDE_FFCV, "0") not in ("", "0"):
        return f"{HIDE_FFCV} hides FFCV"
    if importlib.util.find_spec("ffcv") is None:
        return "FFCV is not installed"
    try:
        from rsengine.augment import for_ffcv  # noqa: F401
    except Exception as error:  # it compiles against libraries of the system, and newer packages than its own break it
        return f"FFCV cannot be imported ({' '.join(f'{type(error).__name__}: {error}'.split())})"
    return None
