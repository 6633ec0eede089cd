"""Errors in what a user gave."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can correct. The message is one line with the remedy; a command prints it as it is.

    Attributes:
        status: exit status of a command that ends with it.
    """

    status = 2


class DataError(UserError):
    """Something is wrong with the data the user gave, or with where it should go: the line names the file."""

    def __init__(self, message: str) -> None:
        # Messages of other libraries end up in ours and may hold line breaks; file names may hold them too.
        super().__init__(" ".join(str(message).splitlines()).strip())
