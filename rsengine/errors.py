"""Errors that several packages raise, and how a command ends with one."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rsengine.data.errors import UserError


class SettingsError(UserError, ValueError):
    """Incompatible settings, or settings that this machine or data set cannot run."""


class LoaderError(UserError):
    """The data pipeline failed."""


def smaller_batch(most: int) -> str:
    """The remedy where a batch may have ``most`` images: the largest power of two, which the recipes use too."""
    if most < 2:
        return "give more images"  # batch norm needs two in a batch
    return f"add --set train.batch_size={1 << (most.bit_length() - 1)}"


def run_command(run: Callable[[], int]) -> int:
    """Run a command and return its exit status.

    An error that the user can correct becomes one line. Any other exception is a bug and keeps its traceback.
    """
    try:
        return run()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "status", UserError.status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
