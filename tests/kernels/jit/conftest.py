"""Where the Triton tests of this folder run: in a TRITON_INTERPRET=1 process on the CPU, or natively on a CUDA GPU.

Anywhere else nothing here is collected; ``tests/kernels/test_jit.py`` starts the interpreter processes.
"""

import contextlib
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]

# No fixture here has function scope: hypothesis refuses those.


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(scope="session")
def allow():
    """``with allow(*tensors):`` lets kernels reach these through pointer tables; natively it does nothing."""
    if not INTERPRETED:
        return lambda *tensors: contextlib.nullcontext()
    from rsengine.kernels.proof import interpreter

    return interpreter.allow


@pytest.fixture(scope="package", autouse=True)
def strict():
    if INTERPRETED:
        from rsengine.kernels.proof import interpreter

        interpreter.install()


@pytest.fixture(scope="package", autouse=True)
def poison():
    """``torch.empty`` and its like hold NaN (integers their largest value), so that an output left out shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    # Only warn: what PyTorch itself computes in these tests need not be deterministic.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
