"""Which implementation is chosen where a caller rules some of them out."""

import threading

import pytest
import torch

from rsengine.kernels import batch_norm, ema_update, explain
from rsengine.kernels.dispatch import (
    NATIVE_OPS,
    OPS,
    UPDATE_OPS,
    assume_triton,
    choose,
    choose_native,
    choose_update,
    choose_update_on_host,
    eager_only,
    may_read,
)
from rsengine.kernels.native import library

ELSEWHERE = torch.empty(1, device="meta")  # stands for a tensor on a GPU while assume_triton() is open
MAPS, VECTORS = {"x": torch.ones(2, 4, 3, 3)}, {"weight": torch.ones(4)}


def choices():
    """What ``impl="auto"`` gives of each op, as on a GPU and on the CPU."""
    with assume_triton():
        triton = {choose(op, "auto", ELSEWHERE) for op in OPS}
        triton |= {updates(op, ELSEWHERE) for op in UPDATE_OPS}
    native = {updates(op, torch.ones(4)) for op in UPDATE_OPS}
    return triton, native | {choose_native(op, "auto", MAPS, VECTORS) for op in NATIVE_OPS}


def updates(op, tensor):
    chosen = choose_update(op, "auto", tensor)
    return chosen if chosen == "triton" else choose_update_on_host(op, chosen, tensor, lambda: "")


def test_inside_eager_only_every_op_is_eager_and_afterwards_as_before():
    before = choices()
    assert before == ({"triton"}, {"native"})
    with pytest.raises(KeyError), eager_only():
        assert choices() == ({"eager"}, {"eager"})
        with eager_only(host_reads=False):
            assert choices() == ({"eager"}, {"eager"})
        assert choices() == ({"eager"}, {"eager"})
        raise KeyError
    assert choices() == before


def test_it_holds_in_threads_that_began_outside():
    """As those of autograd, where activation checkpointing runs a forward pass again."""
    begin, found = threading.Event(), []

    def run():
        begin.wait(10)
        found.append(choices())

    thread = threading.Thread(target=run)
    thread.start()
    with eager_only():
        begin.set()
        thread.join()
    assert found == [({"eager"}, {"eager"})]


def test_asking_for_another_implementation_inside_is_an_error():
    with eager_only(), assume_triton():
        with pytest.raises(RuntimeError, match="'triton' cannot run ema_update here, because .* inside eager_only"):
            choose_update("ema_update", "triton", ELSEWHERE)
        with pytest.raises(RuntimeError, match="'native' cannot run ema_update here, because .* inside eager_only"):
            ema_update([torch.ones(2)], [torch.ones(2)], torch.tensor(0.5), impl="native")
        with pytest.raises(RuntimeError, match="'native' cannot run batch_norm here, because .* inside eager_only"):
            choose_native("batch_norm", "native", MAPS, VECTORS)
        for op in OPS + UPDATE_OPS + NATIVE_OPS:
            assert explain(op, "cpu") == f"{op}: eager on cpu, because the process is inside eager_only()"


def test_nothing_native_runs_inside(monkeypatch):
    monkeypatch.setattr(library, "call", None)
    ones, zeros = torch.ones(4), torch.zeros(4)
    with eager_only():
        batch_norm(torch.randn(2, 4, 3, 3), ones, zeros, zeros.clone(), ones.clone())


def test_without_host_reads_no_value_is_looked_at(monkeypatch):
    """The augmentations' test of it is in tests/augment/test_device.py."""
    monkeypatch.setattr(torch.Tensor, "__float__", None)
    shadow, decay = torch.zeros(3), torch.tensor(0.75)
    assert may_read(decay)
    with eager_only():
        assert may_read(decay)
    with eager_only(host_reads=False), eager_only():
        assert not may_read(decay)
        ema_update([shadow], [torch.ones(3)], decay)
    assert shadow.tolist() == [0.25] * 3


def test_compiled_code_notices_the_block():
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + 1 if may_read(x) else x - 1, fullgraph=True, backend="eager")
    zero = torch.zeros(())
    assert compiled(zero) == 1
    with eager_only(host_reads=False):
        assert compiled(zero) == -1
    assert compiled(zero) == 1
