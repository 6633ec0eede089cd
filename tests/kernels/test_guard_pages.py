"""The C passes touch no byte past the end of a tensor: their tests, with every tensor against an inaccessible page."""

import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("guard_pages.c")
CONVOLUTIONS = "test_forward or test_backward or test_the_end_of_a_block or test_fewer_threads or test_a_gate"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc" or not shutil.which("cc"):
        pytest.skip("tensors are placed through LD_PRELOAD of Linux and glibc, which needs a C compiler")
    library = tmp_path_factory.mktemp("guard") / "guard_pages.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)

    def run(*arguments):
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "3"}
        environment.pop("PYTEST_ADDOPTS", None)
        return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    "code, ends_with",
    [
        ("ctypes.memset(x.data_ptr(), 0, x.nbytes)", 0),
        ("ctypes.memset(x.data_ptr(), 0, x.nbytes + 1)", signal.SIGABRT),
        ("ctypes.memset(x.data_ptr() - 1, 0, 1)", signal.SIGABRT),
        ("ctypes.string_at(x.data_ptr(), x.nbytes + 64)", signal.SIGSEGV),
        ("address = x.data_ptr(); del x; ctypes.string_at(address, 1); x = 0", signal.SIGSEGV),
    ],
)
def test_what_does_not_belong_to_a_tensor_is_not_touched_unseen(guarded, code, ends_with):
    ended = guarded("-c", f"import ctypes, torch; x = torch.ones(50); {code}; del x")
    assert -ended.returncode == ends_with, ended.stderr
    if ends_with == signal.SIGABRT:
        assert "a byte beside a block was written" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "tests, chosen",
    [
        ("test_convolutions.py", CONVOLUTIONS),
        ("test_bottleneck.py", "test_a_chain or test_a_bottleneck"),
        ("test_batch_normalization.py", "test_block_epilogue"),
        ("test_native_update.py", "pytorchs_operators"),
    ],
)
def test_the_passes_stay_inside_their_tensors(guarded, tests, chosen):
    folder = SOURCE.parent
    arguments = "-q", "-p", "no:cacheprovider", f"--rootdir={folder.parents[1]}", str(folder / tests), "-k", chosen
    ended = guarded("-m", "pytest", *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    if " passed" not in ended.stdout:
        pytest.skip(f"the passes do not run here: {ended.stdout}")
