"""A stand-in for a CUDA graph, recorded and replayed on the CPU.

:class:`ReplayRecorder` takes the place of ``CudaRecorder`` under the real ``CapturedStep``. Like a CUDA graph its
replay runs no Python of the step, only the operations recorded, on the storages they were recorded with; and like a
capture its recording leaves every tensor as it was. Tensors made inside are filled with garbage before each replay,
since a graph's pool holds what other replays left there. A registered operator of :mod:`rsengine.kernels` is one
operation, as it is one launch.
"""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import rsengine.engine.update

HOST_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # make tensors and fill nothing


class CaptureError(RuntimeError):
    """The program did what a CUDA capture refuses."""


class ReplayRecorder:
    """Records programs on the CPU. ``rng_devices`` is empty: the CPU's generator is put back in any case."""

    rng_devices = ()

    @contextlib.contextmanager
    def side_stream(self):
        yield

    def record(self, program):
        tape = _Tape()
        with torch.random.fork_rng(devices=()), registered_updates(), tape:
            program()
        tape.undo()
        return tape.replay


@contextlib.contextmanager
def registered_updates():
    """The training step's updates through their registered operators, as a GPU's come.

    On the CPU they are called directly, and read ``decay`` on the host: that costs nothing there, and cannot be
    recorded. Both ways run the same code on the same numbers.
    """

    @torch.no_grad()
    def update(params, grads, momentum_buffers, shadow, lr, momentum, weight_decay, decay, nesterov, *, copies):
        arguments = (params, grads, momentum_buffers, shadow or [], lr, momentum, weight_decay, decay, nesterov)
        torch.ops.rsengine.sgd_ema_step(*arguments, copies or [], "eager")

    @torch.no_grad()
    def average(shadow, params, decay):
        torch.ops.rsengine.ema_update(shadow, params, decay, "eager")

    with (
        mock.patch.object(rsengine.engine.update, "sgd_ema_step", update),
        mock.patch.object(rsengine.engine.update, "ema_update", average),
    ):
        yield


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []  # (operation, args, kwargs, outputs that were new storages or None)
        self.temporaries = []  # tensors made inside
        self.born = set()  # their storages
        self.before = {}  # storage from outside -> itself, and its bytes before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in HOST_READS:
            raise CaptureError(f"{func} reads a tensor on the host")
        for tensor in _tensors((args, kwargs)):
            if _key(tensor) not in self.born and _key(tensor) not in self.before:
                # Whether it will be written or not: native_batch_norm writes without saying so in its schema.
                self.before[_key(tensor)] = tensor.untyped_storage(), tensor.untyped_storage().clone()
        outputs = func(*args, **kwargs)
        known = {_key(tensor) for tensor in _tensors((args, kwargs))}
        fresh = [None if _key(tensor) in known else tensor.detach() for tensor in _tensors(outputs)]
        self.calls.append((func, tree_map(_detached, args), tree_map(_detached, kwargs), fresh))
        self.temporaries += [tensor for tensor in fresh if tensor is not None]
        self.born |= {_key(tensor) for tensor in fresh if tensor is not None}
        return outputs

    def undo(self):
        for storage, value in self.before.values():
            storage.copy_(value)

    @torch.inference_mode()  # which may write both to its own tensors and to others
    def replay(self):
        for tensor in self.temporaries:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
        for func, args, kwargs, outputs in self.calls:
            if not any(output is not None for output in outputs) and not _written(func, args, kwargs):
                continue  # a view: the recorded one still looks at its storage
            if func.overloadpacket.__name__ in UNWRITTEN:
                continue  # what the replay before left there
            for recorded, now in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
                if func.namespace == "_c10d_functional":
                    torch.ops._c10d_functional.wait_tensor(now)  # on a GPU the stream waits
                if recorded is not None:
                    recorded.copy_(now)


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _written(func, args, kwargs):
    """The tensors among the arguments that ``func`` writes to."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


def _detached(value):
    return value.detach() if isinstance(value, torch.Tensor) else value


def _key(tensor):
    return tensor.untyped_storage()._cdata
