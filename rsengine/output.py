"""What commands print: to outputs that may be closed early, as in ``… | head -2``, without ending the work; for people,
for scripts, or not at all."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import io
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# The reader has gone: a pipe closed, a terminal hung up. That is no fault, and no one is left to be told. A file has no
# such reader.
_GONE = {errno.EPIPE, errno.EIO, errno.ECONNRESET}
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(Exception):
    """An error that the user can correct. The message is one line with the remedy; a command prints it as it is.

    Attributes:
        status: exit status of a command that ends with it.
    """

    status = 2


class OutputError(UserError):
    """The result of a command could not be printed, which is what it was run for."""

    status = 1


def one_line(message: object) -> str:
    """``message`` without line breaks, and with everything else that a terminal would obey or lacks written out."""
    words = " ".join(str(message).splitlines()).strip()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def escaped(text: object) -> str:
    """``text`` with escapes for what no line of text holds, as the names of files may.

    These are line breaks and other control characters, which a terminal would follow, and what Python makes of bytes
    that are no text.
    """
    return _NO_TEXT.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``number`` with its noun: ``1 epoch``, ``1,438 images``. ``plural``: where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def program(command: str, module: str = "") -> str:
    """How ``command`` was started, for its usage line: by the console script, or by its ``module`` where that has
    another name."""
    started = Path(sys.argv[0])
    if started.stem.removesuffix("-script") == "rsengine":
        return f"rsengine {command}"
    by_package = started.name == "__main__.py" and started.parent.name == "rsengine"
    return f"python -m rsengine {command}" if by_package else f"python -m rsengine.{module or command}"


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """What ``parser`` makes of ``argv``, by default the process's own. An empty word, which an unset variable of the
    shell gives, names nothing: it ends the command in one line, as the path ``""`` would mean the current folder."""
    words = sys.argv[1:] if argv is None else list(argv)
    before = ""
    for word in words:
        option, equals, value = word.partition("=")
        if not word.strip() or (word.startswith("--") and equals and not value.strip()):
            what = option.strip() or (before if before.startswith("--") else "argument")
            parser.exit(2, f"error: {what}: got an empty text; give a value, or leave it out\n")
        before = word
    return parser.parse_args(words)


def add_output_options(parser: argparse.ArgumentParser, *, result: str, quiet: bool = True) -> None:
    """``--json`` and, with ``quiet``, ``--quiet``; ``result`` says what the object holds."""
    if quiet:
        parser.add_argument("--quiet", action="store_true", help="say nothing but errors")
    parser.add_argument(
        "--json", action="store_true", help=f"print {result} as one JSON object; all else goes to standard error"
    )


def speaker(*, quiet: bool, json: bool) -> Callable[[str], None]:
    """What prints lines for people, as the options of :func:`add_output_options` ask for."""
    if quiet:
        return lambda _line: None
    # A log file shows each line at once. Standard error is looked up at each line: it may be put in place later.
    return (lambda line: print(line, file=sys.stderr, flush=True)) if json else functools.partial(print, flush=True)


def print_json(result: Mapping[str, Any]) -> None:
    """Print ``result`` as the one object of ``--json``. Raises :class:`OutputError` where it cannot be written."""
    print_result(json.dumps(finite(result), allow_nan=False))


def print_result(text: str) -> None:
    """Print what a command was run for, unless its reader has left.

    Raises:
        OutputError: standard output cannot be written, as on a full disk.
    """
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Patient):
        print(text, flush=True)
        return
    raw.quiet = True
    print(text, flush=True)
    if raw.lost:
        raise OutputError(f"{raw.words}: the result cannot be written ({raw.lost}); send it elsewhere")


def finite(value: Any) -> Any:
    """``value`` with None in place of every number that is not finite, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


class _Patient(io.FileIO):
    """A descriptor whose writes never fail. After the first failure it is tried no more.

    Attributes:
        lost: why it cannot be written, for anything but a reader that left; else empty.
        quiet: whoever prints looks at ``lost``, so no line is to say it.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.words, self.failed, self.lost, self.quiet = name, False, "", False

    def write(self, data: object) -> int:
        length = memoryview(data).nbytes
        if self.failed:
            return length
        try:
            return super().write(data)
        except OSError as error:
            self.failed = True
            if error.errno not in _GONE or stat.S_ISREG(os.fstat(self.fileno()).st_mode):
                self.lost = error.strerror
            own_fault = self is getattr(getattr(sys.stderr, "buffer", None), "raw", None)
            if self.lost and not self.quiet and not own_fault:
                print(f"{self.words} cannot be written ({error.strerror}); going on without it", file=sys.stderr)
            return length


@contextlib.contextmanager
def patient_output() -> Iterator[None]:
    """In this block, what is printed to a standard output or error that cannot be written is dropped silently.

    A failure other than a reader that left, such as a full disk, is said once on standard error. Characters that the
    output's encoding lacks are escaped. Streams that somebody else has put in place of the process's own stay.
    """
    _open_standard_descriptors()
    before = sys.stdout, sys.stderr
    names = ("standard output", "standard error")
    own = (sys.__stdout__, sys.__stderr__)
    sys.stdout, sys.stderr = (
        _patient(stream, name) if stream is None or stream is original else stream
        for stream, original, name in zip(before, own, names, strict=True)
    )
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _patient(stream: io.TextIOWrapper | None, name: str) -> io.TextIOBase:
    if stream is None:  # closed before the program began
        return open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (lives as long as the stream it stands for)
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Patient(stream.fileno(), name)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


def _open_standard_descriptors() -> None:
    """Take descriptors 0 to 2 where they are closed, so that no file of a run gets one and libraries print into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        continue
    os.close(descriptor)
