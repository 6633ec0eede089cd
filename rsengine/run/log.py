"""The run folder's log: one JSON object a line in ``metrics.jsonl``, only ever appended to.

A line without its final newline was torn by a kill and is not a record: readers skip it and the next append cuts it
off. Other lines at the end that cannot be read, such as the zeros that a power cut leaves, are skipped too, and go at
the next resume. A line that cannot be read with records behind it is damage, and an error.

Every record has ``kind`` and ``step`` (optimiser steps done when it was written). The kinds and their fields
(accuracies are fractions in 0..1; a loss that is not finite, and every EMA field while EMA is off, is null):

``start``
    One for each process that worked on the run: ``step`` (0, or the step resumed from), ``time_to_first_step``
    (seconds from the command to the end of the first optimiser step), ``device``, ``precision``, ``threads``,
    ``resumed``; optionally ``origin`` (of the weights that the run began with: ``path``, ``sha256``, and the ``mean``
    and ``std`` that came with them; null for random ones), ``data`` (``name``, ``identity``, ``train_images``,
    ``test_images``, and as :class:`rsengine.data.Dataset` has them ``folder``, ``checksum`` and ``sha256``), and
    ``machine`` and ``versions`` as :mod:`rsengine.run.machine` returns them.
``interval``
    One a log interval: ``epoch`` (float, epochs done), ``train_loss`` and ``train_accuracy`` (over the interval),
    ``learning_rate``, ``images_per_second``, ``seconds`` (training time so far); optionally ``loader_seconds`` (of the
    interval: what the loop waited for batches; on a GPU the device may have worked meanwhile) and
    ``checkpoint_seconds`` (of the checkpoints since the record before, which are in no other time).
``epoch``
    One an evaluated epoch: ``epoch`` (int, epochs completed), ``train_loss`` and ``train_accuracy`` (over the epochs
    since the record before), ``test_loss``, ``test_accuracy``, ``test_loss_ema``, ``test_accuracy_ema``,
    ``learning_rate``, ``images_per_second``, ``seconds`` (training time so far, evaluation included, summed over
    resumes), ``epoch_seconds`` (of training, since the record before), ``eval_seconds``; optionally ``test_images``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rsengine.checked import Field, FieldError
from rsengine.data.errors import UserError
from rsengine.disk import sync
from rsengine.output import finite
from rsengine.run.files import METRICS_FILE, write_atomically, writing

START = "start"
INTERVAL = "interval"
EPOCH = "epoch"


_MOST = 2**53  # steps and all else that is counted: no run has as many, and floats hold these exactly


def _count(field: Field) -> None:
    field.integer(0, _MOST)


def _amount(field: Field) -> None:
    field.number(0, 1e300)  # a loss may have any size


def _perhaps(check: Callable[[Field], object]) -> Callable[[Field], None]:
    """``check``, where there is anything."""

    def check_if_any(field: Field) -> None:
        if field.value is not None:
            check(field)

    return check_if_any


def _machine(field: Field) -> None:
    """What :func:`rsengine.run.machine.machine` returns, as far as a report names it."""
    for key, check in _MACHINE.items():
        if key in field:
            check(field[key])


def _versions(field: Field) -> None:
    for version in field.fields():
        _perhaps(Field.text)(version)


def _data(field: Field) -> None:
    """What a trainer says of its data set; older versions said less."""
    for key, check in _DATA.items():
        if key in field:
            check(field[key])


def _name(field: Field) -> None:
    field.text(any_bytes=True)  # of a file, as a rule


_DATA = {
    **dict.fromkeys(("name", "identity", "folder", "checksum"), _name),
    **dict.fromkeys(("train_images", "test_images"), _count),
    "sha256": lambda field: [each.text() for each in field.fields()],
}
_MACHINE = {
    **dict.fromkeys(("processor", "os", "python"), _perhaps(Field.text)),
    **dict.fromkeys(("physical_cores", "logical_cores"), _perhaps(_count)),
    "ram_gib": _perhaps(_amount),
    "gpus": _perhaps(lambda field: [each.text() for each in field.items()]),
}
_LOSS, _SHARE = _perhaps(_amount), _perhaps(lambda field: field.number(0, 1))
_SCORES = {"train_loss": _LOSS, "train_accuracy": _SHARE, "learning_rate": _amount}
_TIMES = {"images_per_second": _amount, "seconds": _amount}
_TESTS = {"test_loss": _LOSS, "test_accuracy": _SHARE, "test_loss_ema": _LOSS, "test_accuracy_ema": _SHARE}
_FIELDS: dict[str, dict[str, Callable[[Field], object]]] = {
    START: {
        "time_to_first_step": Field.number,
        **{"device": Field.text, "precision": Field.text, "threads": _count, "resumed": Field.flag},
        **{"machine": _machine, "versions": _versions},
    },
    INTERVAL: {"epoch": _amount, **_SCORES, **_TIMES},
    EPOCH: {"epoch": _count, **_SCORES, **_TIMES, **_TESTS, "epoch_seconds": _amount, "eval_seconds": _amount},
}
_OPTIONAL: dict[str, dict[str, Callable[[Field], object]]] = {START: {"data": _perhaps(_data)}}


class LogError(UserError, ValueError):
    """A log that cannot be read. The message is one line with the remedy."""


class RunLog:
    """The ``metrics.jsonl`` of one run folder. Holds no open file, so it needs no closing.

    Args:
        folder: the run folder; made, with its parents, by the first `append` when it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / METRICS_FILE

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record as one line, handed to the operating system before this returns.

        A process that is killed afterwards loses nothing; a machine that loses power may lose the lines since the last
        `sync`, which `truncate_after` then tidies.

        Args:
            record: has ``kind`` and ``step``; its values are what JSON can hold. NaN and infinities become null.

        Raises:
            TypeError: a value has no JSON form.
            WriteError: the disk refuses it.
        """
        line = json.dumps(finite(record), allow_nan=False, ensure_ascii=False)
        # A name of a file that is no text has lone surrogates, which UTF-8 lacks and JSON can write as escapes.
        line = line.encode("utf-8", "backslashreplace") + b"\n"

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.path), open(self.path, "a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    # Without this the new record would grow onto the torn line and be lost with it.
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            while line:  # a disk that takes a part of it says at the next try what is wrong
                line = line[file.write(line) :]

    def sync(self) -> None:
        """Have the disk hold what was appended. A checkpoint that counts on it is written afterwards.

        Raises:
            WriteError: the disk refuses it.
        """
        if self.path.exists():
            with writing(self.path):
                sync(self.path)
                sync(self.path.parent)  # its name: the file may be new

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """All records in the order written, or those of one kind; empty when nothing has been logged yet.

        Raises:
            LogError: a line with a record behind it is none itself; names the file and the line.
        """
        return [record for _, record in self._lines() if kind is None or record["kind"] == kind]

    def truncate_after(self, step: int) -> int:
        """Forget what was logged after optimiser step ``step``, before a resume from there logs it again.

        Drops every record whose ``step`` is greater, one that is there twice, and torn last lines. Order and bytes of
        the rest stay. The new file replaces the old one atomically, so a kill leaves one of the two, whole.

        Returns:
            The number of lines dropped.

        Raises:
            LogError: a line with a record behind it that would stay is none itself; the file is then left as it is.
        """
        if not self.path.exists():
            return 0
        lines = self._lines(step)
        doubled = _doubled(lines)
        kept = [line for i, (line, record) in enumerate(lines) if record["step"] <= step and i not in doubled]
        old = self.path.read_bytes()
        torn = old[sum(len(line) for line, _ in lines) :]  # lines are records up to there
        if len(kept) < len(lines) or torn:
            write_atomically(self.path, b"".join(kept))
        return len(lines) - len(kept) + len(torn.removesuffix(b"\n").split(b"\n")) * bool(torn)

    def check(self) -> None:
        """Raise :class:`LogError` unless every record has the fields that curves and report are made of, each of its
        type and in its range."""
        for number, (_, record) in enumerate(self._lines(), start=1):
            try:
                for name, check in _FIELDS.get(record["kind"], {}).items():
                    check(Field(record)[name])
                for name, check in _OPTIONAL.get(record["kind"], {}).items():
                    if name in record:
                        check(Field(record)[name])
            except FieldError as error:
                raise self._damaged(number, str(error)) from error

    def _lines(self, until: int | None = None) -> list[tuple[bytes, dict[str, Any]]]:
        """Every record, as the bytes of its line with the newline and parsed; not what a kill or a power cut left
        behind the last one, and with ``until`` not what it left behind the last of a step up to that: of what was not
        synced, a power cut may take the middle and leave the end."""
        if not self.path.exists():
            return []
        found: list[tuple[bytes, dict[str, Any]]] = []
        damage = None
        # Split at \n only: splitlines() would also cut at separators that JSON allows inside a string.
        *whole, _torn = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(whole, start=1):
            try:
                record = _parsed(line)
            except FieldError as error:
                damage = damage or self._damaged(number, str(error))
                continue
            if damage is not None:  # not at the end: a record that somebody will look for is lost
                if until is None or record["step"] <= until:
                    raise damage
                continue
            found.append((line + b"\n", record))
        return found

    def _damaged(self, number: int, how: str) -> LogError:
        return LogError(
            f"{self.path}, line {number}: {how}; take that line out, or move the file away: the checkpoint is "
            f"independent of it"
        )


def _parsed(line: bytes) -> dict[str, Any]:
    """The record in a line. Raises FieldError."""
    record = Field.of_json(line)
    record["kind"].text()
    record["step"].integer(0, _MOST)
    return record.mapping()


def _doubled(lines: list[tuple[bytes, dict[str, Any]]]) -> set[int]:
    """Places of lines that a copy before them says already: no two records of a run have the same times."""
    seen: set[bytes] = set()
    found = set()
    for i, (line, record) in enumerate(lines):
        if "seconds" in record or "time_to_first_step" in record:
            if line in seen:
                found.add(i)
            seen.add(line)
    return found


def accuracy(record: Mapping[str, Any]) -> float:
    """The test accuracy in an ``epoch`` record: that of the EMA, or of the raw weights if the run has no EMA."""
    ema = record["test_accuracy_ema"]
    return record["test_accuracy"] if ema is None else ema
