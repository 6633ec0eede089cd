"""Text as users write it: any encoding that says what it is, and TOML that may be anything."""

from __future__ import annotations

import codecs
import tomllib
from typing import Any

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

# Twenty times the longest recipe. The parser's time grows with the square of the parts of a dotted key.
_LONGEST_TOML, _MOST_DOTS = 65_536, 1000


def decode(data: bytes) -> str:
    """The text of a file: UTF-8, or what its byte-order mark says, as editors and shells of Windows write it.

    Raises:
        ValueError: it is neither; a phrase that says where.
    """
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not {encoding} text") from error
    if "\0" in text:
        raise ValueError("not UTF-8 text (it holds zeros, as UTF-16 does)")
    return text


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        ValueError: it is none; or the parser gives up on it (nested too deep, too many digits) or would take minutes.
    """
    if len(text) > _LONGEST_TOML:
        raise ValueError(f"longer than {_LONGEST_TOML:,} characters")
    if any(line.count(".") > _MOST_DOTS for line in text.splitlines()):
        raise ValueError(f"a line with more than {_MOST_DOTS:,} dots")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
