"""The one exception of this room."""

from __future__ import annotations


class DataError(Exception):
    """Something is wrong with the data the user gave, or with where it should go.

    The message is one line which names the file and the remedy; a command line prints it as it is.
    """

    def __init__(self, message: str) -> None:
        # Messages of other libraries end up in ours and may hold line breaks; file names may hold them too.
        super().__init__(" ".join(str(message).splitlines()).strip())
