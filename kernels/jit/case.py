"""What a compile case is: one real use of an op's launcher, with what its machine code must keep to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """The most a kernel may use, and the width its global accesses must reach.

    registers: a thread; shared: bytes a program; vector_bytes: 16 where the design asks for 128-bit loads and stores,
    else the width the shape allows; store_bytes: where the stores are narrower than the loads (a reduction's result).
    """

    registers: int
    shared: int
    vector_bytes: int
    store_bytes: int | None = None


@dataclass(frozen=True)
class Stream:
    """A large operand, and how often each of its bytes must cross the memory bus in one call.

    library_reads: by products of PyTorch's library, which the interpreter does not see; beside ``reads``.
    """

    tensors: Sequence[Tensor]
    reads: int
    writes: int
    library_reads: int = 0

    @property
    def bytes(self) -> int:
        crossings = self.reads + self.writes + self.library_reads
        return crossings * sum(t.numel() * t.element_size() for t in self.tensors)


@dataclass(frozen=True)
class CompileCase:
    """One launch of an op at a real shape.

    name: op, pass, dtype and shape, for display.
    launch: ``launch(size)`` makes its operands with ``torch.empty`` on the default device, calls the op's launcher and
        returns the large operands by name. Under the offline compiler nothing runs; the interpreter counts bytes.
    size: the real size (the batch; for the multi-tensor ops the number of parameters): report and predicted time.
    small: a size the interpreter can run, at which the bytes of each stream are counted and must equal what it says.
    budgets: by kernel function name; every kernel the launcher launches has one.
    eager: ``eager(kernels, size)`` makes the same operands, with values that eager code may see, and returns a function
        that does with the public op of ``kernels`` (:mod:`rsengine.kernels`), in PyTorch's operators, what ``launch``
        does: a kernel's time on a GPU is compared with its time.
    uses_library: the launcher also runs products of PyTorch's library. On a GPU they count, and ``launch`` runs no
        other kernels of PyTorch.
    """

    name: str
    launch: Callable[[int], dict[str, Stream]]
    size: int
    small: int
    budgets: dict[str, Budget]
    eager: Callable[[ModuleType, int], Callable[[], object]]
    uses_library: bool = False
