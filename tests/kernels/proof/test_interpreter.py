"""The strict interpreter catches what a GPU would not forgive, and lets sound kernels through."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytest.importorskip("triton")

CAUGHT = {
    "bf16_arithmetic": ("TypeError", "arithmetic on bfloat16 itself: cast to float32 first"),
    "bf16_reduction": ("TypeError", "arithmetic on bfloat16 itself"),
    "truncating_cast": ("AssertionError", "not rounded to nearest"),
    "out_of_bounds_load": (
        "IndexError",
        "copy_kernel program (1, 0, 0) loads out of bounds: 1 lanes outside their tensor",
    ),
    "out_of_bounds_store": ("IndexError", "copy_kernel program (1, 0, 0) stores out of bounds: 1 lanes"),
    "out_of_bounds_into_a_neighbour": ("IndexError", "loads out of bounds"),
    "out_of_bounds_through_a_table": (
        "IndexError",
        "program (1, 0, 0) loads out of bounds: 1 lanes outside every argument",
    ),
    "undeclared_pointer": ("IndexError", "loads out of bounds: 64 lanes outside every argument"),
    "empty_tensor_load": ("IndexError", "loads out of bounds: 64 lanes"),
    "misaligned_load": ("IndexError", "loads 4 bytes at an address that is no multiple of 4"),
    "double_store": ("RaceError", "two lanes of one store in scatter_kernel program (0, 0, 0) write one address"),
    "write_write_race": ("RaceError", "stores 1 addresses after a store by"),
    "read_write_race": ("RaceError", "race: rotate_kernel program"),
    "read_by_many_written_by_one": ("RaceError", "race: read_by_many_kernel program"),
    "halves_of_another_program": ("RaceError", "race: halves_kernel program"),
    "missing_barrier": ("RaceError", "missing barrier: exchange_kernel program"),
    "order_dependence": ("AssertionError", "the order of the programs shows in the result"),
    "atomic_and_plain": ("RaceError", "race: mixed_atomic_kernel program"),
    "device_assert": ("AssertionError", "negative"),
    "int32_overflow": ("OverflowError", "far_kernel program (0, 0, 0) overflows int32"),
    "tf32_dot": ("AssertionError", "dropped bits"),
}
PASSED = (
    "an_error_does_not_stick",
    "bf16_casts_are_torchs",
    "masked_copy_counts",
    "views_keep_their_bounds",
    "in_place",
    "one_storage_in_two_widths",
    "transpose",
    "barrier",
    "pointer_table",
    "bf16_dot_is_exact",
    "ieee_dot",
    "nothing_at_all",
)


@pytest.fixture(scope="module")
def outcomes():
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.proof.planted_faults"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("fault", CAUGHT)
def test_planted_fault_is_caught(outcomes, fault):
    error, message = CAUGHT[fault]
    assert outcomes[fault].startswith(f"{error}: ") and message in outcomes[fault], outcomes[fault]


@pytest.mark.parametrize("case", PASSED)
def test_sound_kernel_passes(outcomes, case):
    assert outcomes[case] == "passed"


def test_every_case_is_judged(outcomes):
    assert set(outcomes) == {*CAUGHT, *PASSED}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is an interpreter")
def test_install_needs_an_interpreter():
    from rsengine.kernels.proof import interpreter

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        interpreter.install()
    with pytest.raises(RuntimeError, match="install"), interpreter.count_traffic():
        pass


OLD_TRITON_NEW_NUMPY = """
from triton.runtime import interpreter as upstream
from rsengine.kernels.proof import interpreter

def index(self):  # Triton 3.6's, where int() is NumPy 2.4's
    if self.handle.data.ndim:
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")
    return int(self.handle.data)

def patch(tensor, scope, patch=upstream._patch_lang_tensor):
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", index)

upstream._patch_lang_tensor = patch
interpreter.install()
"""


def test_install_names_the_numpy_that_an_old_triton_needs():
    done = subprocess.run(
        [sys.executable, "-c", OLD_TRITON_NEW_NUMPY],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    line = done.stderr.rstrip().rpartition("\n")[2]
    assert line.startswith("RuntimeError: Triton ") and "does not work with NumPy" in line
    assert line.endswith(": install 'numpy<2.4', or Triton 3.7 or later")
