"""``python -m rsengine.gpu_check``: everything that only a GPU can tell, in one call of a few minutes.

Parts run in order of value, each in a process of its own and each row of a part within its own limit, so that a hang, a
crash or a broken CUDA context costs the others nothing. Every result is written at once, to one JSON and
one Markdown file named by card and date. A second call continues with what is missing. Works in a copied source tree
without installation. Without a CUDA GPU it says so and changes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rsengine.checks.gpu import report
from rsengine.checks.gpu.parts import CARD, PARTS, Part
from rsengine.checks.gpu.runner import ROOT, Check
from rsengine.errors import SettingsError, run_command
from rsengine.output import parsed
from rsengine.run.files import remove_leftovers, write_atomically

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

RESULTS, DRY_RUNS = ROOT / "bench" / "results", ROOT / "runs" / "gpu-check"
SECONDS, LEAST_SECONDS = 430.0, 15.0
DEVICES = ("cuda", "cpu")
FINISH_SECONDS = 3.0  # for the last writing
LOGS = "gpu-check-logs"


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status: 0 all is well or there is no GPU, 1 something is wrong, 2 bad arguments,
    130 interrupted."""
    arguments = parsed(_parser(), argv)
    return run_command(lambda: _check(arguments))


def _check(arguments: argparse.Namespace) -> int:
    parts = _parts(arguments.parts)
    if arguments.list:
        print(listing(parts))
        return 0
    if arguments.device not in DEVICES:
        raise SettingsError(f"GPU_DEVICE: expected {' or '.join(DEVICES)}; got {arguments.device!r}")
    if not arguments.seconds >= LEAST_SECONDS:
        raise SettingsError(f"--seconds: expected at least {LEAST_SECONDS:g}; got {arguments.seconds:g}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu check: this machine has no usable CUDA GPU; nothing was run and nothing was written")
        return 0
    out = Path(arguments.out or (RESULTS if arguments.device == "cuda" else DRY_RUNS)).resolve()
    (out / LOGS).mkdir(parents=True, exist_ok=True)
    with ended_like_ctrl_c(), alone_in(out / LOGS):
        for folder in (out, out / LOGS):
            remove_leftovers(folder)
        return _run(parts, arguments, out)


def _parts(names: str | None) -> list[Part]:
    known = {part.name: part for part in PARTS}
    if names is None:
        return list(PARTS)
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        problem = f"no part is called {', '.join(unknown)}" if unknown else "no part is named"
        raise SettingsError(f"--parts: {problem}; there are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys([CARD.name, *chosen])]


def _run(parts: list[Part], arguments: argparse.Namespace, out: Path) -> int:
    start = time.monotonic()
    stem = f"{card_name(arguments.device)}-{datetime.date.today().isoformat()}"
    call = {"command": shlex.join(["python", "-m", "rsengine.gpu_check", *sys.argv[1:]]), "seconds": 0}
    call |= {"date": datetime.datetime.now().isoformat(" ", "seconds"), "source": source_digest()}
    document = earlier(stem, [out, RESULTS])
    document["calls"].append(call)
    results: report.Results = document["parts"]
    unwritten: list[str] = []

    def say(line: str) -> None:
        print(f"[{time.monotonic() - start:5.0f} s] {line}", flush=True)

    def write() -> None:
        call["seconds"] = round(time.monotonic() - start)
        try:
            write_atomically(out / f"{stem}.json", (json.dumps(document, indent=1, default=str) + "\n").encode())
            write_atomically(out / f"{stem}.md", report.render(results, document["calls"]).encode())
            unwritten.clear()
        except OSError as error:  # a full disk: what was measured is still printed at the end
            if not unwritten:
                say(f"cannot write {out}: {error.strerror}; free some space; they are written again with the next row")
            unwritten[:] = [f"not written: {out / stem}.json ({error.strerror})"]

    check = Check(
        results,
        seconds=arguments.seconds - FINISH_SECONDS,
        device=arguments.device,
        logs=out / LOGS,
        again=arguments.again,
        source=call["source"],
        changed=write,
        say=say,
    )
    interrupted = False
    try:
        check.run(parts)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted; what was measured is written, and a second call goes on", flush=True)
    write()
    print(*report.summary(results), *(unwritten or [f"wrote {out / stem}.json and .md"]), sep="\n", flush=True)
    if interrupted:
        return 130
    return 1 if report.failures(results) or unwritten else 0


@contextlib.contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """In this block SIGTERM and SIGHUP act like Ctrl-C: the parts end too, and what they have found is written."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: one of them
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Refuse a second call into the same folder: each would write over what the other has found."""
    with open(folder / "lock", "w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError(
                f"--out {folder.parent}: another call is running there; wait, or name another"
            ) from error
        yield


def card_name(device: str) -> str:
    name = torch.cuda.get_device_name(0) if device == "cuda" else "dry run on the CPU"
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def earlier(stem: str, folders: list[Path]) -> dict[str, Any]:
    """What an earlier call of today has found on this card, in the first of ``folders`` that holds it.

    Raises:
        SettingsError: the file is damaged, or was not written by this check.
    """
    for folder in folders:
        file = folder / f"{stem}.json"
        if not file.exists():
            continue
        try:
            found = json.loads(file.read_text())
            report.render(found["parts"], found["calls"])  # reads everything that a call relies on
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            raise SettingsError(f"{file}: not a result of this check ({problem}); move it away") from error
        print(f"going on with {file}")
        return found
    return {"calls": [], "parts": {}}


def source_digest() -> str:
    """The start of a hash of the measured sources: it identifies the code of a figure where there is no git."""
    digest = hashlib.sha256()
    for folder in ("rsengine", "kernels", "data", "bench"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def listing(parts: list[Part]) -> str:
    """The parts, their rows and predicted times, as the Markdown table of docs/gpu-check.md."""
    lines = ["| part | what it tells | first call, s | rows of a first call, s | rows that follow as time allows, s |"]
    lines.append("|---|---|---:|---|---|")
    for part in parts:
        first, later = (
            "; ".join(f"{row.name}: {row.seconds:.0f}" for row in part.rows if row.essential == essential)
            for essential in (True, False)
        )
        lines.append(f"| `{part.name}` | {part.what} | {part.seconds(essential=True):.0f} | {first} | {later} |")
    total = sum(part.seconds(essential=True) for part in parts)
    return "\n".join([*lines, f"| **all** | | **{total:.0f}** | | |"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rsengine.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", metavar="A,B", help="run these parts only, in this order (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="N", help="end after N seconds (default: %(default)s)"
    )
    parser.add_argument("--out", metavar="DIR", help="where results go (default: bench/results/)")
    parser.add_argument("--list", action="store_true", help="print the parts and their predicted times, and exit")
    parser.add_argument("--again", action="store_true", help="measure anew what an earlier call of today has measured")
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default=os.environ.get("GPU_DEVICE", "cuda"),
        help="cpu: a dry run of what makes sense there, on a tiny network (default: $GPU_DEVICE, else cuda)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
