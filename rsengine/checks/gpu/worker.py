"""The process of one part, which ``runner`` starts: ``python -m rsengine.checks.gpu.worker MODULE FILE …``.

It writes ``FILE`` whole before and after each row: what is running, and every result so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from rsengine.checks.gpu.parent import die_with
from rsengine.run.files import write_atomically

BROKEN_DEVICE = 75  # exit status: the device no longer responds in this process; the remaining rows need another
MARGIN_SECONDS = 4.0  # this long before its limit, a row ends the processes it has started, and reports


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("module", help="has measure(row, setup)")
    parser.add_argument("file", type=Path)
    parser.add_argument("--row", action="append", nargs=2, metavar=("NAME", "LIMIT"), required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, required=True, help="until this process is ended")
    arguments = parser.parse_args(argv)
    die_with(os.getppid())

    from rsengine.checks.gpu.device import setup_for

    deadline = time.monotonic() + arguments.seconds
    setup, module = setup_for(arguments.device), importlib.import_module(arguments.module)
    state: dict[str, Any] = {"rows": {}, "running": None, "since": time.time()}
    for row, limit in arguments.row:
        state |= {"running": row, "since": time.time()}
        started = time.monotonic()
        write(arguments.file, state)
        seconds = min(float(limit), deadline - started) - MARGIN_SECONDS
        try:
            result = module.measure(row, dataclasses.replace(setup, seconds=max(seconds, 1.0)))
        except Exception as error:  # a row that fails is a result, and the others run
            traceback.print_exc()
            result = {"wrong": [f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]]}
        gc.collect()  # steps and graphs are in reference cycles, and hold memory that the next row needs
        state["rows"][row] = result | {"seconds": round(time.monotonic() - started, 2)}
        state |= {"running": None, "since": time.time()}
        write(arguments.file, state)
        if not answers(setup):  # also after a good row: it may have handled the error that broke the device
            return BROKEN_DEVICE
    return 0


def answers(setup: Any) -> bool:
    """Whether the device still responds. After some CUDA errors it does not, in the process that met them."""
    try:
        setup.device.synchronize()
    except RuntimeError as error:
        print(f"the device no longer responds: {error}", file=sys.stderr)
        return False
    return True


def write(file: Path, state: dict[str, Any]) -> None:
    write_atomically(file, json.dumps(state, default=str).encode())


if __name__ == "__main__":
    sys.exit(main())
