"""Values that were read from a file, checked before anything believes them: types, ranges and names of fields.

    content = Field.of_json(text)
    height, width = (side.integer(1, 65535) for side in content["image_size"].items(2))

Whatever is wrong raises :class:`FieldError`, whose message names the field and what was expected there. Whoever reads
the file adds its name and the remedy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

_LONGEST = 200  # characters of a value in an error line
MOST_ITEMS = 1_000_000  # of a list, and characters of a text: more than any file of this project has


class FieldError(ValueError):
    """A field of a file with a wrong value. The message is a phrase: ``field: expected X; got Y``."""


class Field:
    """A value that was read from a file, and its name there, such as ``counts.train``."""

    def __init__(self, value: Any, name: str = "") -> None:
        self.value, self.name = value, name

    @classmethod
    def of_json(cls, text: str | bytes, name: str = "") -> Field:
        """The value of a JSON text. Raises :class:`FieldError` where it has none."""
        where = f"{name}: " if name else ""
        try:
            return cls(json.loads(text), name)
        except RecursionError as error:
            raise FieldError(f"{where}not valid JSON (nested too deep)") from error
        except ValueError as error:
            raise FieldError(f"{where}not valid JSON ({error})") from error

    def error(self, expected: str, got: str | None = None) -> FieldError:
        """The error to raise where the field is not what was ``expected``."""
        where = f"{self.name}: " if self.name else ""
        return FieldError(f"{where}expected {expected}; got {shown(self.value) if got is None else got}")

    def __getitem__(self, key: str) -> Field:
        """The field ``key`` of an object. Raises :class:`FieldError` where there is none."""
        values = self.mapping()
        name = f"{self.name}.{key}" if self.name else key
        if key not in values:
            raise FieldError(f"{name}: missing")
        return Field(values[key], name)

    def __contains__(self, key: str) -> bool:
        return key in self.mapping()

    def mapping(self) -> dict[Any, Any]:
        """An object, or a dictionary with names for keys."""
        if not isinstance(self.value, dict) or not all(isinstance(key, str) for key in self.value):
            raise self.error("names with values")
        return self.value

    def items(self, count: int | None = None) -> list[Field]:
        """The items of a list, ``count`` of them unless that is None."""
        if not isinstance(self.value, list | tuple) or count not in (None, len(self.value)):
            raise self.error("a list" if count is None else f"a list of {count}")
        if len(self.value) > MOST_ITEMS:
            raise self.error(f"a list of at most {MOST_ITEMS:,}")
        return [Field(value, f"{self.name}[{place}]") for place, value in enumerate(self.value)]

    def integer(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``."""
        if type(self.value) is not int or not low <= self.value <= high:
            raise self.error(f"an integer from {low:,} to {high:,}")
        return self.value

    def number(self, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number from ``low`` to ``high``."""
        known = type(self.value) in (int, float) and low <= self.value <= high  # false for NaN
        if not known or abs(self.value) > 1e308:
            bounded = math.isfinite(low) or math.isfinite(high)
            raise self.error(f"a number from {low:g} to {high:g}" if bounded else "a finite number")
        return float(self.value)

    def text(self, *, any_bytes: bool = False) -> str:
        """Text that can be written in UTF-8; or, like the names of files, may stand for bytes in any encoding."""
        known = isinstance(self.value, str) and len(self.value) <= MOST_ITEMS
        if not known or (not any_bytes and any("\ud800" <= letter <= "\udfff" for letter in self.value)):
            raise self.error("text")
        return self.value

    def flag(self) -> bool:
        """True or false."""
        if type(self.value) is not bool:
            raise self.error("true or false")
        return self.value

    def fields(self) -> Iterator[Field]:
        """The fields of an object."""
        return (self[key] for key in self.mapping())


def shown(value: Any) -> str:
    """``value`` in an error line, which it must not fill."""
    try:
        words = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # an integer of thousands of digits
        words = f"a value of type {type(value).__name__} too long to show"
    return words if len(words) <= _LONGEST else words[:_LONGEST] + "…"
