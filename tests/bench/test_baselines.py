"""What bench/test_train_step.py times beside rsengine runs, each in a process of its own as there."""

import contextlib

import pytest

from bench.baselines import BASELINES, Case
from bench.own_process import OwnProcess

COMPILED = "timm, channels_last, bfloat16, torch.compile"  # a minute of compiling: left to `make bench-train`


@pytest.mark.parametrize("name", sorted(BASELINES.keys() - {COMPILED}))
def test_a_baseline_steps(name):
    case = Case(26, stem_width=8, stem_stride=2, size=32, batch=4)
    with contextlib.closing(OwnProcess(name, case)) as process:
        assert process.step() > 0
