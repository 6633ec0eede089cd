"""Records the operations of a step on the fake device: their operands, and the lines that called them.

A dispatch mode sees every operator below autograd and autocast, as a GPU would receive it.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rsengine.checks.findings import COPY, FAILURE, HOST_TENSOR, SYNCHRONISATION, Finding, Site, innermost_site, origin


class Operand(NamedTuple):
    """A tensor that an operation is given."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: str
    source: tuple  # ("made", operation, output) in this step, ("kept", storage) from before it, () on the host

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Operation:
    """One operator call.

    Attributes:
        name: ``aten.add.Tensor`` and the like.
        arguments: an :class:`Operand` for each tensor, the ``repr`` of anything else; of an object in C++ its type.
        site: the line of the step that called it; in a backward pass, that which started the pass.
        forward: in a backward pass, the line whose gradient this is, where known.
        labels: the :class:`torch.profiler.record_function` blocks it was called in, outermost first; in a backward pass
            those of the operation whose gradient this is, where known.
        launches: whether it gives the device work: neither a view nor an allocation.
        bytes: of its operands and results, each once, and twice what it changes.
        flops: of its matrix products and convolutions, where PyTorch has a formula.
    """

    name: str
    arguments: tuple[Operand | str, ...]
    site: Site | None
    forward: Site | None
    labels: tuple[str, ...]
    launches: bool
    bytes: int = 0
    flops: int = 0


class Origin(NamedTuple):
    """Where an operation was called: the line of the step, and the labels around it."""

    site: Site | None
    labels: tuple[str, ...]


class Birth(NamedTuple):
    """Where a storage came from. The weak reference keeps the address from being reused, not the memory alive."""

    storage: StorageWeakRef
    step: int
    operation: int
    output: int


class Halt(Exception):
    """Raised inside a step that cannot continue, because the value that it asks for does not exist."""


class Trace(TorchDispatchMode):
    """Records one step after another; :meth:`begin` starts each.

    Attributes:
        steps: the operations of each step.
        births: by storage, what the steps have allocated.
        findings: those that a single operation shows.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.steps: list[list[Operation]] = []
        self.births: dict[int, Birth] = {}
        self.findings: list[Finding] = []
        self._labels: tuple[str, ...] = ()
        self._origins: dict[int, Origin] = {}  # of the forward operations, by autograd's sequence number

    def begin(self) -> None:
        self.steps.append([])
        self._labels, self._origins = (), {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            self._follow_label(func, args)
        if func.namespace in ("prim", "profiler"):  # queries and labels
            return func(*args, **kwargs)
        operations, leaves = self.steps[-1], tree_leaves((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        site, forward, labels = self._origin()
        index, name = len(operations), str(func).removesuffix(".default")
        arguments = tuple(self._operand(leaf) if isinstance(leaf, Tensor) else _text(leaf) for leaf in leaves)
        if func.namespace in COLLECTIVES and not any(self.is_ours(t) for t in inputs):
            self.refuse_wait(name, site, forward, "other processes")
        if any(self.is_ours(t) for t in inputs) and waits_for_device(func, inputs, kwargs):
            self.refuse_wait(name, site, forward)
        outputs = self.call(func, args, kwargs)
        made = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        self._note_crossing(func, name, inputs, made, site, forward)
        known = {storage_of(t) for t in inputs}
        fresh = [t for t in made if storage_of(t) not in known]
        for output, tensor in enumerate(fresh):
            storage = tensor.untyped_storage()
            self.births[storage._cdata] = Birth(StorageWeakRef(storage), len(self.steps), index, output)
        ours = any(self.is_ours(t) for t in (*inputs, *made))
        launches = ours and launches_work(func, inputs, fresh)
        cost = cost_of(func, args, kwargs, outputs) if launches else (0, 0)
        operations.append(Operation(name, arguments, site, forward, labels, launches, *cost))
        return outputs

    def refuse_wait(self, name: str, site: Site | None, forward: Site | None, what: str = "the device") -> None:
        """The operator needs a value, and a fake tensor has none."""
        self.note_wait(name, site, forward, what)
        raise Halt

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on fake tensors. One that returns nothing needs no shapes, and may have no fake version."""
        return func(*args, **kwargs) if func._schema.returns else None

    def note_wait(self, name: str, site: Site | None, forward: Site | None = None, what: str = "the device") -> None:
        detail = f"the host waits for {what}, which a capture forbids"
        self.findings.append(Finding(SYNCHRONISATION, name, site, detail, forward))

    def note_failure(self, error: Exception) -> None:
        last = f"after {self.steps[-1][-1].name}" if self.steps[-1] else "before the first operation"
        lines = str(error).strip().splitlines() or [""]
        self.findings.append(Finding(FAILURE, last, origin(error), f"{type(error).__name__}: {lines[0]}"))

    def is_ours(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device_type

    def _operand(self, tensor: Tensor) -> Operand:
        storage = storage_of(tensor)
        birth = self.births.get(storage)
        source: tuple = ("kept", storage)
        if birth is not None and birth.step == len(self.steps):
            source = ("made", birth.operation, birth.output)
        elif not self.is_ours(tensor):
            source = ()  # the host's addresses are no part of a replay
        shape, stride = tuple(tensor.shape), tensor.stride()
        return Operand(shape, stride, tensor.storage_offset(), tensor.dtype, tensor.device.type, source)

    def _follow_label(self, func: Any, args: Any) -> None:
        if func.overloadpacket is torch.ops.profiler._record_function_enter_new:
            self._labels += (args[0],)
        else:
            self._labels = self._labels[:-1]

    def _origin(self) -> tuple[Site | None, Site | None, tuple[str, ...]]:
        """The innermost line of the step, in a backward pass the line whose gradient is being computed, and labels."""
        site, node = innermost_site(sys._getframe(2)), torch._C._current_autograd_node()
        if node is not None:
            forward = self._origins.get(node._sequence_nr(), Origin(None, self._labels))
            return site, *forward
        # Autograd numbers its nodes, and makes an operator's before it calls it: the newest is this one's.
        self._origins.setdefault(torch.autograd._get_sequence_nr() - 1, Origin(site, self._labels))
        return site, None, self._labels

    def _note_crossing(
        self, func: Any, name: str, inputs: list[Tensor], made: list[Tensor], site: Site | None, forward: Site | None
    ) -> None:
        host = [t for t in inputs if not self.is_ours(t)]
        ours_in, ours_out = len(host) < len(inputs), any(self.is_ours(t) for t in made)
        if not ours_in and not ours_out:
            return
        if any(not self.is_ours(t) for t in made):
            self.findings.append(Finding(COPY, name, site, "it copies a result to the host", forward))
        elif any(t.dim() for t in host) or (host and func.overloadpacket in COPIES):
            self.findings.append(Finding(COPY, name, site, "it copies a host tensor to the device", forward))
        elif host:
            detail = "a tensor of shape () on the host is made part of the operation"
            self.findings.append(Finding(HOST_TENSOR, name, site, detail, forward))


class HostReads(TorchFunctionMode):
    """Reports reads of a value that go through no operator: formatting a fake tensor gives its shape."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__format__, Tensor.__repr__) and self.trace.is_ours(args[0]):
            self.trace.note_wait("formatting a tensor", innermost_site(sys._getframe(1)))
            raise Halt
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def contained_hooks() -> Iterator[None]:
    """In the block, what a gradient hook raises becomes a finding, and the backward pass goes on.

    On a device written in Python, autograd ends the process where a hook raises (PyTorch 2.14).
    """

    def contained(register: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(tensor: Tensor, hook: Callable[..., Any]) -> Any:
            return register(tensor, lambda *arguments: _contain(hook, *arguments))

        return replacement

    names = ("register_hook", "register_post_accumulate_grad_hook")
    before = {name: getattr(Tensor, name) for name in names}
    try:
        for name, register in before.items():
            setattr(Tensor, name, contained(register))
        yield
    finally:
        for name, register in before.items():
            setattr(Tensor, name, register)


def _contain(hook: Callable[..., Any], *arguments: Any) -> Any:
    active = next((mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Trace)), None)
    try:
        return hook(*arguments)
    except Halt:  # a finding already
        return None
    except Exception as error:
        if active is None:
            raise
        active.note_failure(error)
        return None


COLLECTIVES = ("c10d", "_c10d_functional")  # namespaces: of torch.distributed, and of its form for programs
COPIES = {torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.copy}
# Synchronise in their CUDA implementation without the tag that says so.
UNTAGGED = {torch.ops.aten._linalg_check_errors, torch.ops.aten._is_all_true, torch.ops.aten._is_any_true}


def _text(value: object) -> str:
    """What an argument must stay from step to step. A C++ object's ``repr`` is the address of what wraps it."""
    return str(value._type()) if isinstance(value, torch.ScriptObject) else repr(value)


def waits_for_device(func: Any, inputs: list[Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether the host has to know a value to run the operator on a GPU.

    Boolean masks as indices count, though CUDA turns the one case of ``x[mask] = number`` into ``masked_fill_``.
    """
    packet = func.overloadpacket
    if packet in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        return any(t.dtype in (torch.bool, torch.uint8) for t in inputs[1 : None if packet is _INDEX else -1])
    if packet is torch.ops.aten.repeat_interleave and kwargs.get("output_size") is not None:
        return False
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return packet in UNTAGGED or not tags.isdisjoint(func.tags)


_INDEX = torch.ops.aten.index


# Allocations; and what has one stream of the device wait for another, where a collective runs.
NO_WORK = ("empty", "new_empty", "wait_tensor")


def launches_work(func: Any, inputs: list[Tensor], fresh: list[Tensor]) -> bool:
    """Whether an operator on the device has it compute anything. ``fresh``: outputs in storages of their own."""
    if func.is_view or func.overloadpacket.__name__.startswith(NO_WORK):
        return False
    if func._schema.is_mutable or not func._schema.returns:
        return any(t.numel() for t in inputs)
    return any(t.numel() for t in fresh)


def cost_of(func: Any, args: Any, kwargs: Any, outputs: Any) -> tuple[int, int]:
    """What an operator asks of the device: :attr:`Operation.bytes` and :attr:`Operation.flops`."""
    tensors = {id(t): t for t in tree_leaves((args, kwargs, outputs)) if isinstance(t, Tensor)}
    moved = sum(t.nbytes for t in tensors.values())
    if func.overloadpacket not in OVERWRITING:
        given = zip(func._schema.arguments, args, strict=False)  # what is changed is never given by keyword here
        changed = [value for spec, value in given if spec.alias_info is not None and spec.alias_info.is_write]
        moved += sum(t.nbytes for t in tree_leaves(changed) if isinstance(t, Tensor))
    count = flop_registry.get(func.overloadpacket)
    return moved, int(count(*args, **kwargs, out_val=outputs)) if count is not None else 0


# Write what they change, and do not read it.
OVERWRITING = {torch.ops.aten.copy_, torch.ops.aten._foreach_copy_, torch.ops.aten.zero_, torch.ops.aten.fill_}


def storage_of(tensor: Tensor) -> int:
    """What identifies the memory a tensor lies in."""
    return tensor.untyped_storage()._cdata
