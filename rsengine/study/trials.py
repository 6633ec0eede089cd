"""The trials of a study: where each is, the command that trains it, how far it is, and what became of it.

A study's folder has ``trials/VARIANT-seed-N/``, an ordinary run folder, and beside it ``VARIANT-seed-N.log``, what the
run said, and ``VARIANT-seed-N.json``, its outcome once it has ended.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rsengine.checked import Field, FieldError
from rsengine.config import Recipe
from rsengine.run.files import CHECKPOINT_FILE, METRICS_FILE, write_atomically
from rsengine.run.log import EPOCH, RunLog
from rsengine.study.file import StudyError

DONE, DIVERGED, FAILED = "done", "diverged", "failed"
ENDED = (DONE, DIVERGED)  # these are not tried again: a trial that diverged would do so again
TRIALS, RECIPES = "trials", "recipes"
_NOT_FINITE = "no longer a finite number"  # of :class:`rsengine.trainer.DivergedError`


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        status: ``done``, ``diverged`` or ``failed``.
        why: the last line of what it said, unless it is done.
        source: the version of the code that ended it, see :func:`rsengine.study.manifest.source_version`.
        result: what ``rsengine train --json`` printed; empty unless it is done.
    """

    status: str
    why: str = ""
    source: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One variant with one seed, in the study in ``study``."""

    variant: str
    seed: int
    recipe: Recipe
    study: Path

    @property
    def name(self) -> str:
        return f"{self.variant}-seed-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.study / TRIALS / self.name

    @property
    def log(self) -> Path:
        return self.study / TRIALS / f"{self.name}.log"

    def command(self, data: str, device: str) -> list[str]:
        """The command that trains it, or goes on with it where it has a checkpoint."""
        command = [sys.executable, "-m", "rsengine.train", "--json", "--device", device, "--data", data]
        command += ["--out", str(self.folder)]
        if (self.folder / CHECKPOINT_FILE).is_file():
            return [*command, "--resume"]
        recipe = self.study / RECIPES / f"{self.variant}.toml"
        return [*command, "--recipe", str(recipe), "--seed", str(self.seed)]

    def outcome(self) -> Outcome | None:
        """What became of it; None while it has not ended. Raises :class:`StudyError` for a damaged file."""
        if not self._outcome.is_file():
            return None
        try:
            values = Field.of_json(self._outcome.read_bytes())
            words = [values[key].text(any_bytes=True) for key in ("status", "why", "source")]
            if words[0] not in (DONE, DIVERGED, FAILED):
                raise values["status"].error(f"one of {DONE}, {DIVERGED}, {FAILED}")
            return Outcome(*words, values["result"].mapping())
        except FieldError as error:
            raise StudyError(f"{self._outcome}: {error}; remove it, and the trial is ended again") from error

    def end(self, status: int, output: str, source: str) -> Outcome:
        """Record how its process ended: with the exit ``status``, below 0 for a signal, having printed ``output``."""
        outcome = self._ended(status, output, source)
        write_atomically(self._outcome, (json.dumps(asdict(outcome), indent=1) + "\n").encode())
        return outcome

    def epochs(self) -> list[dict[str, Any]]:
        """The records of its evaluated epochs."""
        return RunLog(self.folder).records(EPOCH)

    def progress(self) -> tuple[float, float]:
        """How many epochs are done, and the seconds that they took."""
        if not (self.folder / METRICS_FILE).is_file():
            return 0.0, 0.0
        records = [record for record in RunLog(self.folder).records() if "seconds" in record and "epoch" in record]
        return (float(records[-1]["epoch"]), float(records[-1]["seconds"])) if records else (0.0, 0.0)

    @property
    def _outcome(self) -> Path:
        return self.study / TRIALS / f"{self.name}.json"

    def _ended(self, status: int, output: str, source: str) -> Outcome:
        if status == 0:
            try:
                return Outcome(DONE, source=source, result=Field.of_json(output).mapping())
            except FieldError as error:
                return Outcome(FAILED, f"what it printed is no result: {error}", source)
        lines = self.log.read_text("utf-8", errors="replace").split("\n") if self.log.is_file() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        diverged = status == 1 and last.startswith("error: ") and _NOT_FINITE in last
        if not diverged and not last.startswith("error: "):
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            last = f"ended with {how}: {last}"
        # The tables say it, and are the same wherever the study lies.
        why = last.removeprefix("error: ").replace(str(self.folder), self.name)
        return Outcome(DIVERGED if diverged else FAILED, why, source)
