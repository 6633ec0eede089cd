"""Runs ``jit/test_*.py`` in Triton's interpreter: one process a file, and one test here for each.

Two of them run at once, but one where pytest itself has several processes.

The longer grid: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/jit -m slow_grid``.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(path.name for path in (Path(__file__).parent / "jit").glob("test_*.py"))
TIMEOUT = 1200  # seconds: against a kernel that never ends, not a budget
pytest.importorskip("triton")


def run(name, options):
    # No GPU in there: the same files run natively where there is one, collected like any other test.
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", f"tests/kernels/jit/{name}", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT
    )


@pytest.fixture(scope="session")
def runs(request):
    """A future for each file that this session selected, all of them under way."""
    names = [item.callspec.params["name"] for item in request.session.items if item.path == Path(__file__)]
    # What this session leaves out of a grid is left out in there too.
    is_short = "not thorough" in request.config.option.markexpr
    options = ["-m", "not slow_grid and not thorough"] if is_short else []
    with ThreadPoolExecutor(max_workers=1 if "PYTEST_XDIST_WORKER" in os.environ else 2) as pool:
        yield {name: pool.submit(run, name, options) for name in names}
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(runs, name, record_property):
    done = runs[name].result()
    summary = done.stdout.strip().rpartition("\n")[2].strip("= ")
    record_property("interpreted", f"{name}: {summary}")
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-6000:]}"
    assert re.search(r"\b[1-9]\d* passed\b", summary), f"no test was run: {summary}"
