"""What stands for a step on a GPU may not look at values on the host, and is PyTorch's operators alone."""

import sys

import pytest

from rsengine.kernels import augment_eager


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(sys.modules["rsengine.kernels.batch_normalization"], "choose_native", lambda *_: "eager")
    monkeypatch.setattr(augment_eager, "may_read", lambda images: False)
