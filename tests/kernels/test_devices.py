"""Launches go to the device of the operands, whichever device is current: seen with fake tensors on a second GPU."""

import importlib
import pkgutil
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from triton.runtime import KernelInterface

from rsengine.kernels import jit
from rsengine.kernels.jit import ema_table
from rsengine.kernels.jit.guard import on_operands_device

SECOND = torch.device("cuda", 1)
MODULES = [importlib.import_module(f"{jit.__name__}.{info.name}") for info in pkgutil.iter_modules(jit.__path__)]
OPS = [module for module in MODULES if hasattr(module, "compile_cases")]


class Current:
    """Stands for ``torch.cuda.device``, the context manager: the devices that are current, the innermost last."""

    devices = [torch.device("cuda", 0)]

    def __init__(self, device):
        self.device = torch.device(device)

    def __enter__(self):
        self.devices.append(self.device)

    def __exit__(self, *error):
        self.devices.pop()


class Kernel:
    """Stands for a Triton kernel, and notes on which device it was launched."""

    def __init__(self, name, launched):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append((self.name, Current.devices[-1]))


@pytest.fixture
def launched(monkeypatch):
    """(kernel, device) of each launch."""
    found = []
    for module in OPS:
        for name, value in list(vars(module).items()):
            if isinstance(value, KernelInterface):
                monkeypatch.setattr(module, name, Kernel(name, found))
    monkeypatch.setattr(torch.cuda, "device", Current)
    # Fake tensors have no addresses to put into a table.
    table = SimpleNamespace(records=[0], weight_decay=None, strides=None, dtypes=(torch.float32,) * 3)
    monkeypatch.setattr(ema_table, "layouts_of", lambda *lists: ())
    monkeypatch.setattr(ema_table, "tables", lambda *arguments: (table,))
    return found


@pytest.mark.parametrize("module", OPS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_launch_is_on_the_operands_device(module, launched):
    for case in module.compile_cases():
        with FakeTensorMode(), SECOND:
            case.launch(case.small)
    kernels = {name for name, value in vars(module).items() if isinstance(value, Kernel)}
    assert kernels and {name for name, _ in launched} == kernels
    assert {device for _, device in launched} == {SECOND}
    assert Current.devices == [torch.device("cuda", 0)]


def test_on_the_cpu_no_device_is_made_current(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", None)
    one = torch.ones(1)
    assert on_operands_device(lambda *arguments: arguments)([], one) == ([], one)
