"""What bench/test_train_step.py times beside rsengine runs, each in a process of its own as there."""

import contextlib

import pytest

from bench.baselines import BASELINES, Case
from bench.contender import Apart

COMPILED = "timm, channels_last, bfloat16, torch.compile"  # a minute of compiling: left to `make bench-train`


@pytest.mark.parametrize("name", sorted(BASELINES.keys() - {COMPILED}))
def test_a_contender_steps(name):
    case = Case(26, stem_width=8, stem_stride=2, size=32, batch=4)
    with contextlib.closing(Apart(name, case)) as contender:
        assert contender.step() > 0
