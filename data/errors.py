"""Errors in what a user gave."""

from __future__ import annotations

from collections.abc import Sequence

from rsengine.output import UserError, one_line

__all__ = ["DataError", "UserError", "few", "one_line"]
NAMED = 5  # names in one message


class DataError(UserError):
    """Something is wrong with the data the user gave, or with where it should go: the line names the file."""

    def __init__(self, message: str) -> None:
        # Messages of other libraries end up in ours and may hold line breaks; file names may hold them too.
        super().__init__(one_line(message))


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are: all that is wrong belongs into one message, or a user with a
    hundred bad files tries a hundred times."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more:,} more" if more > 0 else "")
