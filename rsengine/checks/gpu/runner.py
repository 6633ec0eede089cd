"""Runs the parts of a GPU check within a time limit: each in its own process, each row with its own limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rsengine.checks.gpu.parts import START_SECONDS, Part, Row, outcome
from rsengine.checks.gpu.worker import BROKEN_DEVICE
from rsengine.data.find import VARIABLE

ROOT = Path(__file__).resolve().parents[3]
START_LIMIT = 90.0  # seconds until a process has imported what it needs and begun its first row
LEAST_SECONDS = 5.0  # with less time left, nothing is started
POLL_SECONDS = 0.1
TIME_OVER = "was cut off: the time was over"


class Check:
    """One call of the check: runs what earlier calls have not finished, within its time.

    Args:
        results: rows of earlier calls, by part and name; new ones are added as soon as they are measured.
        seconds: the time that :meth:`run` may take.
        device: ``"cuda"``, or ``"cpu"`` for a dry run.
        again: measure again what earlier calls have measured; their results stay until there are new ones.
        source: digest of the measured code, kept with each row.
        logs: folder for the output of the parts.
        changed: called after each change of ``results``.
        say: prints a line.
    """

    def __init__(
        self,
        results: dict[str, dict[str, dict[str, Any]]],
        *,
        seconds: float,
        device: str,
        logs: Path,
        again: bool = False,
        source: str = "",
        changed: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.results, self.device, self.logs, self.changed, self.say = results, device, logs.resolve(), changed, say
        self.again, self.source = again, source
        self._deadline = time.monotonic() + seconds
        self._tried: set[tuple[str, str]] = set()

    @property
    def left(self) -> float:
        """Seconds left."""
        return self._deadline - time.monotonic()

    def run(self, parts: Sequence[Part]) -> None:
        """Run the essential rows of all parts, then the others as far as they are expected to fit."""
        self.logs.mkdir(parents=True, exist_ok=True)
        for essential in (True, False):
            for part in parts:
                rows = [row for row in self.missing(part) if row.essential == essential]
                while rows and self.left >= LEAST_SECONDS:
                    chosen = rows if essential else self._fitting(rows)
                    if not chosen:
                        break
                    self._process(part, chosen)
                    rows = [row for row in rows if (part.name, row.name) not in self._tried]

    def missing(self, part: Part) -> list[Row]:
        """The rows without a good result that can run here, those never tried first."""
        rows = [row for row in part.rows if self.device == "cuda" or row.on_cpu]
        known = self.results.get(part.name, {})
        rows = [row for row in rows if self.again or not is_measured(known.get(row.name, {}))]
        return sorted(rows, key=lambda row: row.name in known)

    def _fitting(self, rows: Sequence[Row]) -> list[Row]:
        chosen, left = [], self.left - START_SECONDS
        for row in rows:
            if row.seconds <= left:
                chosen.append(row)
                left -= row.seconds
        return chosen

    def _process(self, part: Part, rows: Sequence[Row]) -> None:
        """Run rows in one process until they are done, it ends, a row reaches its limit, or the time is over."""
        expected = START_SECONDS + sum(row.seconds for row in rows)
        self.say(f"{part.name}: {', '.join(row.name for row in rows)} (about {expected:.0f} s; {self.left:.0f} s left)")
        state_file, log = self.logs / f"{part.name}.json", self.logs / f"{part.name}.log"
        state_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "rsengine.checks.gpu.worker", part.module, str(state_file)]
        command += [word for row in rows for word in ("--row", row.name, str(row.limit))]
        command += ["--device", self.device, "--seconds", f"{self.left:.1f}"]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)])
        environment["PYTHONUNBUFFERED"] = "1"
        if environment.get(VARIABLE) and Path(environment[VARIABLE]).exists():
            environment[VARIABLE] = str(Path(environment[VARIABLE]).resolve())  # the worker runs in another folder
        limits = {row.name: row.limit for row in rows}
        printed = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        state: dict[str, Any] = {"rows": {}, "running": None, "since": time.time()}
        ended = ""
        try:
            while process.poll() is None and not ended:
                time.sleep(POLL_SECONDS)
                state = self._read(part, state_file, state)
                limit = limits.get(state["running"], START_LIMIT)
                if self.left <= 0:
                    ended = TIME_OVER
                elif time.time() - state["since"] > limit:
                    ended = f"was not finished within its limit of {limit:.0f} s"
        finally:
            end_group(process)
        state = self._read(part, state_file, state)
        said = log.read_bytes()[printed:].decode(errors="replace").strip().splitlines()[-1:]
        self._note_end(part, rows, state, ended or how_it_ended(process.returncode), "".join(said))

    def _read(self, part: Part, file: Path, before: dict[str, Any]) -> dict[str, Any]:
        """The worker's state; its new rows are put into the results."""
        if not file.exists():
            return before
        state = json.loads(file.read_text())
        for name in state["rows"].keys() - before["rows"].keys():
            self._record(part, name, state["rows"][name])
        return state

    def _record(self, part: Part, name: str, result: dict[str, Any]) -> None:
        self._tried.add((part.name, name))
        self.results.setdefault(part.name, {})[name] = result | {"source": self.source}
        self.changed()
        self.say(f"  {part.name}, {name}: {outcome(result)[:300]}{took(result)}")

    def _note_end(self, part: Part, rows: Sequence[Row], state: dict[str, Any], ended: str, said: str) -> None:
        """Record the row that was running when its process ended, or every row where it had not begun one."""
        left = [row.name for row in rows if row.name not in state["rows"]]
        if not left:
            return
        if ended == TIME_OVER:  # the row is still missing: the next call begins with it
            self.say(f"  {part.name}, {state['running'] or 'start'}: {ended}")
        elif ended != how_it_ended(BROKEN_DEVICE) or not state["rows"]:
            wrong = f"the process {ended}" + (f"; it last said: {said.strip()[:200]}" if said else "")
            for name in [state["running"]] if state["running"] else left:
                self._record(part, name, {"wrong": [wrong]})


def is_measured(result: dict[str, Any]) -> bool:
    """Whether there is a result, nothing is wrong with it, and it was not left out."""
    return bool(result) and not result.get("wrong") and "left_out" not in result


def took(result: dict[str, Any]) -> str:
    return f" ({result['seconds']:.0f} s)" if "seconds" in result else ""


def how_it_ended(status: int) -> str:
    """How a process ended, in words."""
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def end_group(process: subprocess.Popen) -> None:
    """End a process and what it has started."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
