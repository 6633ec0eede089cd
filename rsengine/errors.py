"""Errors that several packages raise, and how a command ends with one."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rsengine.cache import keep_compiled_code
from rsengine.output import UserError, escaped, one_line, patient_output


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

    An error that the user can correct becomes one line. Any other exception is a bug and keeps its traceback. An
    output that is closed early, as in ``… | head -2``, does not end the command.
    """
    with patient_output():
        try:
            keep_compiled_code()
            return run()
        except (UserError, OSError) as error:
            print(f"error: {one_line(error) or type(error).__name__}", file=sys.stderr)
            return getattr(error, "status", UserError.status)
        except UnicodeEncodeError as error:
            if error.encoding == "utf-8":
                raise
            missing = error.object[error.start : error.end]
            print(
                f"error: {escaped(error.object)}: file names are in {error.encoding} here, which lacks {missing}; set "
                "the environment variable PYTHONUTF8=1",
                file=sys.stderr,
            )
            return UserError.status
        except (MemoryError, RuntimeError) as error:
            if not _is_want_of_memory(error):
                raise
            remedy = "a smaller batch or network, or a machine with more of it, may do"
            print(
                f"error: not enough memory ({one_line(error)[:200] or type(error).__name__}); {remedy}", file=sys.stderr
            )
            return UserError.status
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130


def _is_want_of_memory(error: Exception) -> bool:
    """Whether Python, or PyTorch's allocator on the CPU or on a GPU, found no memory."""
    words = str(error)
    return isinstance(error, MemoryError) or "can't allocate memory" in words or "out of memory" in words
