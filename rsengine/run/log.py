"""The run folder's log: one JSON object a line in ``metrics.jsonl``, only ever appended to.

A line without its final newline was torn by a kill and is not a record: readers skip it and the next append cuts it
off. Any other line that cannot be read is damage, and an error.

Every record has ``kind`` and ``step`` (optimiser steps done when it was written). The kinds and their fields
(accuracies are fractions in 0..1; a loss that is not finite, and every EMA field while EMA is off, is null):

``start``
    One for each process that worked on the run: ``step`` (0, or the step resumed from), ``time_to_first_step``
    (seconds from the command to the end of the first optimiser step), ``device``, ``precision``, ``threads``,
    ``resumed``; optionally ``machine`` and ``versions`` as :mod:`rsengine.run.machine` returns them.
``interval``
    One a log interval: ``epoch`` (float, epochs done), ``train_loss`` and ``train_accuracy`` (over the interval),
    ``learning_rate``, ``images_per_second``, ``seconds`` (training time so far).
``epoch``
    One an evaluated epoch: ``epoch`` (int, epochs completed), ``train_loss`` and ``train_accuracy`` (over the epochs
    since the record before), ``test_loss``, ``test_accuracy``, ``test_loss_ema``, ``test_accuracy_ema``,
    ``learning_rate``, ``images_per_second``, ``seconds`` (training time so far, evaluation included, summed over
    resumes), ``epoch_seconds`` (of training, since the record before), ``eval_seconds``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rsengine.run.files import METRICS_FILE, write_atomically, writing

START = "start"
INTERVAL = "interval"
EPOCH = "epoch"


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
        line = json.dumps(_finite(record), allow_nan=False, ensure_ascii=False).encode() + b"\n"

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
        """Have the disk hold what was appended. A checkpoint that counts on it is written afterwards."""
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """All records in the order written, or those of one kind; empty when nothing has been logged yet.

        Raises:
            ValueError: a line other than a torn last one is not a record; names the file and the line.
        """
        return [record for _, record in self._lines() if kind is None or record["kind"] == kind]

    def truncate_after(self, step: int) -> int:
        """Forget what was logged after optimiser step ``step``, before a resume from there logs it again.

        Drops every record whose ``step`` is greater, one that is there twice, and a torn last line, keeping the order
        and the bytes of the rest. The new file replaces the old one atomically, so a kill leaves one of the two, whole.

        Returns:
            The number of lines dropped.

        Raises:
            ValueError: a line other than a torn last one is not a record; the file is then left as it is.
        """
        if not self.path.exists():
            return 0
        lines = self._lines()
        doubled = _doubled(lines)
        kept = [line for i, (line, record) in enumerate(lines) if record["step"] <= step and i not in doubled]
        old = self.path.read_bytes()
        torn = bool(old) and not old.endswith(b"\n")
        if len(kept) < len(lines) or torn:
            write_atomically(self.path, b"".join(kept))
        return len(lines) - len(kept) + torn

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Every whole line, as bytes with its newline and parsed."""
        if not self.path.exists():
            return []
        found = []
        # Split at \n only: splitlines() would also cut at separators that JSON allows inside a string.
        *whole, _torn = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(whole, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}: not valid JSON ({error})") from error
            if not isinstance(record, dict) or "kind" not in record or not isinstance(record.get("step"), int):
                raise ValueError(f"{self.path}, line {number}: expected an object with kind and an integer step")
            found.append((line + b"\n", record))
        return found


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


def _finite(value: Any) -> Any:
    """``value`` with None in place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
