"""What is written in pictures: fonts that have its characters, and the width that it takes.

Names of classes and data sets come in any script. DejaVu Sans, which matplotlib brings along, has Latin, Greek,
Cyrillic, Arabic and many symbols; for the rest the fonts installed on the machine are looked through. Importing this
module does not import matplotlib.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from rsengine.data.errors import few
from rsengine.output import escaped

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font

DPI = 150
BASE = "DejaVu Sans"
_WITHOUT_GLYPHS = ("lastresort", "adobeblank")  # fonts that draw every character as a box, or as nothing


class Lettering:
    """The fonts for some texts: DejaVu Sans, then installed ones for the characters that it lacks.

    Attributes:
        families: names of fonts in the order in which matplotlib looks for a character.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        lacking = {character for text in texts for character in plain(text) if not _has(BASE, character)}
        self.families = (BASE, *_installed(frozenset(lacking)))

    def has(self, text: str) -> bool:
        """Whether all characters of ``text`` can be drawn."""
        return all(any(_has(family, character) for family in self.families) for character in plain(text))

    def drawable(self, text: str) -> str:
        """``text`` in one line, with an escape such as ``\\u732b`` for each character that no font has."""
        return "".join(c if self.has(c) or c == " " else c.encode("unicode_escape").decode() for c in plain(text))

    def width(self, text: str, size: float, *, bold: bool = False) -> float:
        """Pixels that the widest line of ``text``, which can be drawn, takes at font size ``size``."""
        from matplotlib.font_manager import FontProperties
        from matplotlib.textpath import TextPath

        font = FontProperties(family=list(self.families), weight="bold" if bold else "normal", size=size)
        lines = [line for line in text.split("\n") if line.strip()]
        points = max((TextPath((0, 0), line, prop=font, usetex=False).get_extents().width for line in lines), default=0)
        return float(points) * DPI / 72

    def fitting(self, text: str, width: float, *, largest: float, bold: bool = False) -> float:
        """The largest font size, of 5.5 to ``largest``, at which ``text`` fits into ``width`` pixels; 5.5 if none."""
        drawn = self.width(text, largest, bold=bold)
        return largest if drawn <= width else max(5.5, largest * width / drawn)


def plain(text: object) -> str:
    """``text`` in one line, with single spaces."""
    return " ".join(str(text).split())


def labels(names: Sequence[str]) -> list[str]:
    """What to call classes in pictures: by their names, or those that no font can draw by their numbers, from #1."""
    letters = Lettering(names)
    return [name if plain(name) and letters.has(name) else f"#{i}" for i, name in enumerate(names, start=1)]


def labels_said(names: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """The :func:`labels` of classes. Where some are numbers, one line says which and why."""
    found = labels(names)
    numbered = [f"{label} {escaped(name)}" for label, name in zip(found, names, strict=True) if label != name]
    if numbered:
        say(
            f"pictures: no font on this machine has the characters of {few(numbered)}, so they are shown by these "
            "numbers; a font for them (for Chinese, Japanese and Korean: fonts-noto-cjk) mends it"
        )
    return found


@functools.cache
def _has(family: str, character: str) -> bool:
    """Whether a family has a character both in its normal and in its bold face."""
    return all(_draws(font, character) for font in _faces(family))


@functools.cache
def _faces(family: str) -> list[FT2Font]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    wanted = [FontProperties(family=[family], weight=weight) for weight in ("normal", "bold")]
    return [get_font(findfont(each, fallback_to_default=False)) for each in wanted]


def _draws(font: FT2Font, character: str) -> bool:
    """Whether a font has a glyph for a character that matplotlib can draw: not one that is an image, as emojis are."""
    if not font.get_char_index(ord(character)):
        return False
    try:
        font.set_size(10, DPI)
        return font.load_char(ord(character)).width > 0 or not character.isprintable() or character.isspace()
    except RuntimeError:
        return False


@functools.cache
def _installed(characters: frozenset[str]) -> tuple[str, ...]:
    """Few families of the fonts installed here that together have as many of ``characters`` as can be had."""
    if not characters:
        return ()
    from matplotlib import font_manager

    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    families = set()
    # Not matplotlib's own list: it is made once, and lacks what has been installed since.
    for path in sorted(font_manager.findSystemFonts()):
        try:
            font = font_manager.get_font(path)
        except (RuntimeError, OSError):  # damaged, or of a kind that it does not read
            continue
        name = font.family_name
        ignored = name.lower().replace(" ", "").lstrip(".").startswith(_WITHOUT_GLYPHS)
        if ignored or not any(_draws(font, character) for character in characters):
            continue
        if path not in known:
            font_manager.fontManager.addfont(path)
        families.add(name)
    chosen, left = [], set(characters)
    while left:
        # Sans-serif beside DejaVu Sans where there is a choice; by name, so that each run chooses the same.
        score = {name: (sum(_has(name, c) for c in left), "sans" in name.lower()) for name in sorted(families)}
        best = max(score, key=score.__getitem__, default=None)
        if best is None or not score[best][0]:
            break
        chosen.append(best)
        left = {character for character in left if not _has(best, character)}
    return tuple(chosen)
