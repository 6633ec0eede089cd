"""Errors in what a user gave."""

from __future__ import annotations

from collections.abc import Sequence

NAMED = 5  # names in one message


class UserError(Exception):
    """An error that the user can correct. The message is one line with the remedy; a command prints it as it is.

    Attributes:
        status: exit status of a command that ends with it.
    """

    status = 2


def one_line(message: object) -> str:
    """``message`` without line breaks, and with everything else that a terminal would obey or lacks written out."""
    words = " ".join(str(message).splitlines()).strip()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


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
