"""Pages in HTML that need nothing beside themselves: elements, tables, charts, pictures, and the document around them.

A page is one file without a reference to any other, so that it can be mailed, archived and opened from a disk. Its
charts are inline SVG that ``page.js`` draws from numbers in the page. Hover, zoom and a legend take 200 lines, a tenth
of what a vendored library would add to every page; the charts take their colours from ``page.css`` in light, dark and
print, and they stay sharp on paper. A content security policy lets the page run that script alone and load nothing, so
that no name of a class or a file, whatever it holds, can do more than be read.

Everything that becomes HTML passes through :func:`tag`, which escapes all that is not :class:`Markup` already.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import numpy as np

from rsengine.output import escaped

LIMIT = 2_000_000  # bytes of a page
COLOURS = ("blue", "vermilion", "green", "purple", "orange", "sky")  # variables of page.css
_POINTS = 600  # of a line: more than one for each two pixels that it is wide
_SIDE = 64  # pixels; larger pictures are made smaller
_VOID = {"img", "meta", "link"}
_SCRIPT_SAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


class Markup(str):
    """Text that is HTML."""


def markup(value: Any) -> Markup:
    """``value`` as HTML: as it is if it is :class:`Markup`, and otherwise the text of it."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(escaped(re.sub(r"\s+", " ", str(value)))))


def tag(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """An element. An attribute ``class_`` is ``class``, and ``data_value`` is ``data-value``; None leaves it out."""
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{markup(value)}"')
    opened = f"<{' '.join(words)}>"
    return Markup(opened if name in _VOID else f"{opened}{joined(content)}</{name}>")


def joined(parts: Iterable[Any]) -> Markup:
    """Pieces of HTML and of text, one behind the other."""
    return Markup("".join(map(markup, parts)))


def preformatted(text: str) -> Markup:
    """A block of text whose line breaks count."""
    lines = "\n".join(html.escape(escaped(line)) for line in text.strip("\n").split("\n"))
    return Markup(f"<pre>{lines}</pre>")


def shortened(words: Any, length: int = 60) -> str:
    """``words`` in at most ``length`` characters."""
    words = " ".join(str(words).split())
    return words if len(words) <= length else words[: length - 1] + "…"


def note(*words: Any) -> Markup:
    """A paragraph that explains."""
    return tag("p", *words, class_="note")


def scrolled(content: Markup, label: str) -> Markup:
    """What may be wider than a phone, which scrolls it sideways."""
    return tag("div", content, class_="scroll", tabindex=0, role="region", aria_label=label)


def facts(rows: Iterable[tuple[Any, Any]]) -> Markup:
    """Names and values in two columns."""
    lines = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in rows]
    return tag("table", tag("tbody", *lines), class_="facts")


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    numbers: Iterable[int] = (),
    keys: Sequence[Sequence[Any]] | None = None,
    marked: Iterable[int] = (),
) -> Markup:
    """A table that scrolls where it does not fit.

    Args:
        numbers: the columns that hold numbers.
        keys: makes the table sortable: what to sort each cell of ``rows`` by, None for a cell without a value.
        marked: the rows to mark.
    """
    numbers, marked = set(numbers), set(marked)

    def kind(column: int) -> str | None:
        return "n" if column in numbers else None

    titles = [tag("button", name, type="button") if keys else name for name in head]
    heads = [tag("th", title, scope="col", class_=kind(i)) for i, title in enumerate(titles)]
    lines = []
    for i, row in enumerate(rows):
        sorts = ["" if key is None else key for key in keys[i]] if keys else [None] * len(row)
        cells = [tag("td", cell, class_=kind(j), data_value=sorts[j]) for j, cell in enumerate(row)]
        lines.append(tag("tr", *cells, class_="changed" if i in marked else None))
    content = joined([tag("thead", tag("tr", *heads)), tag("tbody", *lines)])
    return scrolled(tag("table", content, class_="sortable" if keys else None), " ".join(head))


def details(summary: str, *content: Markup) -> Markup:
    """What is shown when asked for, and in print."""
    return tag("details", tag("summary", summary), *content)


def picture(pixels: np.ndarray, alt: str, **attributes: Any) -> Markup:
    """An image in the page. ``pixels``: (H, W, 3) uint8; larger ones than 64 pixels are made smaller, as JPEG."""
    from PIL import Image

    image, file = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) <= _SIDE:
        image.save(file, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((2 * _SIDE, 2 * _SIDE))
        image.save(file, "JPEG", quality=85)
        kind, attributes = "jpeg", attributes | {"class_": "smooth"}
    return image_tag(file.getvalue(), kind, alt, **attributes)


def image_tag(data: bytes, kind: str, alt: str, **attributes: Any) -> Markup:
    """An image in the page, from the bytes of its file."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return tag("img", src=source, alt=alt, title=alt, **attributes)


@dataclass(frozen=True)
class Line:
    """A line of a chart: ``points`` are (x, y), in the order of x."""

    name: str
    colour: str  # of COLOURS
    points: Sequence[tuple[float, float]]
    dash: str = ""  # of SVG's stroke-dasharray
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over the epochs. All charts of a page show the same part of them."""

    title: str
    lines: Sequence[Line]
    unit: str = ""  # behind a value
    zero: bool = False  # the axis begins there


@dataclass(frozen=True)
class Section:
    """A part of a page with its heading, and its entry in the list at the top."""

    anchor: str
    title: str
    content: Sequence[Markup | Chart]


TOOLS = Markup(
    '<div class="tools"><button type="button" value="0.5">Zoom in</button><button type="button" value="2">Zoom out'
    '</button><button type="button">Whole run</button><span class="note">Drag across a chart to zoom; '
    "a double click shows the whole run.</span></div>"
    "<noscript><p>The charts need scripts, which are off here; curves.png of a run shows them too.</p></noscript>"
)


def document(title: str, top: Sequence[Markup], sections: Sequence[Section]) -> bytes:
    """The page: its heading, what stands on top, a list of the sections, and the sections with their charts."""
    charts: list[Chart] = []
    bodies = []
    for section in sections:
        content: list[Markup] = []
        row: list[Markup] = []
        for part in (*section.content, None):
            if isinstance(part, Chart):
                charts.append(part)
                row.append(tag("figure", tag("h3", part.title), class_="chart"))
                continue
            if row:
                content.append(tag("div", *row, class_="charts"))
                row = []
            if part is not None:
                content.append(part)
        bodies.append(tag("section", tag("h2", section.title), *content, id=section.anchor))
    links = [tag("a", section.title, href=f"#{section.anchor}") for section in sections]
    files = resources.files("rsengine.run")
    style, script = ((files / name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("link", rel="icon", href="data:,"),  # without it a browser asks its server for one
        tag("title", title),
        Markup(f"<style>{style}</style>"),
    ]
    data = json.dumps([_data(chart) for chart in charts], allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    for letter, code in _SCRIPT_SAFE.items():
        data = data.replace(letter, code)
    body = [
        tag("h1", title),
        *top,
        tag("nav", *links, aria_label="Sections"),
        tag("main", *bodies),
        Markup(f'<script type="application/json" id="charts">{data}</script><script>{script}</script>'),
    ]
    text = f'<!DOCTYPE html>\n<html lang="en">\n<head>{joined(head)}</head>\n<body>{joined(body)}</body>\n</html>\n'
    return text.encode(errors="backslashreplace")  # names may hold bytes that are no text


def _data(chart: Chart) -> dict[str, Any]:
    lines = [asdict(line) | {"name": escaped(line.name), "points": _thinned(line.points)} for line in chart.lines]
    return asdict(chart) | {"lines": lines}


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points that they can be told apart, the first and the last among them."""
    every = max(1, math.ceil(len(points) / _POINTS))
    kept = [point for i, point in enumerate(points) if i % every == 0 or i == len(points) - 1]
    return [(float(f"{x:.7g}"), float(f"{y:.6g}")) for x, y in kept]
