"""What stands for a step on a GPU may not look at values on the host, and is PyTorch's operators alone."""

import pytest

from rsengine.kernels.dispatch import eager_only


@pytest.fixture
def as_on_a_gpu():
    with eager_only(host_reads=False):
        yield
