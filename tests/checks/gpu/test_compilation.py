"""Kernels compiled beforehand, in shares: by the offline compiler in the place of a GPU's."""

import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile")

from rsengine.checks.gpu import compilation, smoke
from rsengine.kernels.proof import offline
from rsengine.kernels.proof.compile_report import all_cases
from tests.checks.gpu.stand_in import setup

CASES = [case for op in ("batch_norm", "cross_entropy", "ema", "augment") for case in all_cases()[op][:4]]


def launch_all():
    for case in CASES:
        case.launch(case.small)


def test_each_kernel_is_compiled_in_one_share(monkeypatch):
    keys, launch_key = [], compilation.launch_key
    monkeypatch.setattr(compilation, "launch_key", lambda *given: keys.append(launch_key(*given)) or keys[-1])
    shares = []
    with offline.compiling_for("sm_90") as launches:
        for index, count in ((0, 1), (0, 3), (1, 3), (2, 3)):
            with compilation.compiling_share(index, count) as compiled:
                launch_all()
            shares.append(compiled)
        assert launches == []  # no launch got past compilation
        launch_all()
        assert len(launches) >= len(shares[0])
    whole, *parts = shares
    assert len(whole) == len(set(keys)) and all(parts)
    assert sorted(whole) == sorted(name for part in parts for name in part)
    assert not any(" at 0x" in key for key in keys)  # it would differ from process to process


@pytest.mark.usefixtures("as_on_a_gpu")
def test_what_is_compiled_for_runs(monkeypatch):
    rows = []
    monkeypatch.setattr(smoke, "measure", lambda row, setup: rows.append(row))
    compilation.run_programs(setup())
    assert rows == ["cross-entropy", "batch norm", "block epilogue", "update", "augmentation"]


def test_the_shares_are_summed_and_a_process_that_fails_is_named():
    code = "import sys; print('warm'); print(3) if sys.argv[1] != '1/3' else sys.exit('error: no memory')"
    found = compilation.compile_shares([sys.executable, "-c", code], 60, processes=3)
    assert found["kernels"] == 6 and found["processes"] == 3
    assert found["wrong"] == ["process 1 of 3 ended with status 1: error: no memory"]
