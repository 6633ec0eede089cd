"""Compiles the kernels for GPUs this machine does not have, and reads the machine code. Nothing is executed.

The launchers run as they are, on CPU tensors: Triton's own front end specialises on the addresses and sizes it is
given, and its own back end and ``ptxas`` make the code that a GPU of that architecture would run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ..jit.case import Budget, CompileCase

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"

BUDGETS_OF = "3.8"  # the Triton that the budgets are of: the pinned one, which also wrote the report
# Registers a thread that another Triton may take beyond a budget: 3.6 takes up to 25 more in batch norm, 3.7 up to 20
# in the augmentation on sm_100. A GPU hands them out in steps of 8: four. And bytes a thread that it may spill: 3.6
# spills two registers in the block epilogue.
OTHER_TRITON, OTHER_SPILLS = 32, 8

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """One launch that was recorded instead of carried out."""

    kernel_name: str
    grid: tuple[int, ...]
    kernel: CompiledKernel


@dataclass(frozen=True)
class MachineCode:
    """What the machine code of one kernel says.

    registers: a thread; spilled: bytes of stack and local memory a thread; local: instructions that touch them;
    shared: bytes a program; loads, stores: instructions on global memory by the bytes a thread moves with each;
    tensor_columns: tensor memory a program.
    """

    registers: int
    spilled: int
    local: int
    shared: int
    num_warps: int
    loads: Counter[int]
    stores: Counter[int]
    atomics: int
    tensor_columns: int = 0


@dataclass(frozen=True)
class CompiledLaunch:
    """A distinct kernel of a case: several launches that share their machine code are one."""

    kernel_name: str
    programs: int
    code: MachineCode


@dataclass(frozen=True)
class CompiledCase:
    """``launches`` in order; ``streams``: (bytes, reads, writes) of each large operand; ``elements`` of the largest."""

    launches: tuple[CompiledLaunch, ...]
    streams: dict[str, tuple[int, int, int]]
    elements: int

    @property
    def bytes(self) -> int:
        """The bytes that must cross the memory bus."""
        return sum(size * (reads + writes) for size, reads, writes in self.streams.values())


class _Driver:
    """The part of a Triton driver that launching asks for before the first instruction would run."""

    def __init__(self, arch: str):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]

    def get_current_device(self) -> str:
        return f"offline {self.arch}"  # the key of Triton's cache of kernels: no real device has this one

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(arch: str) -> Iterator[list[Launch]]:
    """Inside, every launch of a Triton kernel compiles it for ``arch`` and is recorded in the list, not carried out.

    Args:
        arch: a key of :data:`TARGETS`.

    Raises:
        ValueError: ``arch`` is not one of :data:`TARGETS`.
    """
    if arch not in TARGETS:
        raise ValueError(f"arch: expected one of {', '.join(TARGETS)}; got {arch!r}")
    launches: list[Launch] = []
    run, previous, hip = JITFunction.run, driver._active, torch.version.hip

    def record(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)  # a warm-up is a launch that ends at compilation
        if not warmup:
            if callable(grid):
                grid = grid(dict(zip(self.arg_names, args, strict=False)) | kwargs)
            launches.append(Launch(self.fn.__name__, tuple(grid), kernel))
        return kernel

    driver.set_active(_Driver(arch))
    JITFunction.run = record
    # Launchers may ask which GPUs this PyTorch was built for: it is the one that a user of ``arch`` has.
    torch.version.hip = "offline" if TARGETS[arch].backend == "hip" else None
    try:
        yield launches
    finally:
        JITFunction.run, torch.version.hip = run, hip
        driver.set_active(previous)  # None, where nothing was launched before: Triton then looks for a GPU when asked


def compile_case(case: CompileCase, arch: str) -> CompiledCase:
    """Compile what ``case`` launches at its real size.

    Raises:
        RuntimeError: nothing was launched, as when Triton's interpreter is on.
        triton.CompilationError, RuntimeError: the kernel does not compile for ``arch``.
    """
    with compiling_for(arch) as launches:
        operands = case.launch(case.size)
    if not launches:
        raise RuntimeError(f"{case.name}: expected a launch of a compiled kernel; got none (is TRITON_INTERPRET set?)")
    first = {launch.kernel.hash: launch for launch in reversed(launches)}
    distinct = [launch for launch in launches if first[launch.kernel.hash] is launch]
    return CompiledCase(
        tuple(CompiledLaunch(each.kernel_name, prod(each.grid), inspect(each.kernel)) for each in distinct),
        {
            name: (sum(t.nbytes for t in each.tensors), each.reads + each.library_reads, each.writes)
            for name, each in operands.items()
        },
        max(sum(t.numel() for t in stream.tensors) for stream in operands.values()),
    )


@lru_cache(maxsize=256)  # launches of one kernel share one object, and two tools run for each
def inspect(kernel: CompiledKernel) -> MachineCode:
    """Read the machine code of a compiled kernel: SASS for NVIDIA, the assembly in the code object for AMD."""
    return _inspect_amd(kernel) if kernel.metadata.target.backend == "hip" else _inspect_nvidia(kernel)


def _inspect_nvidia(kernel: CompiledKernel) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        resources = tool_output("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool_output("nvdisasm", "-c", "-ndf", file.name)  # without its data-flow analysis: faster, the same code
    usage: Counter[str] = Counter()
    for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", resources):  # of the kernel and any function it calls
        usage[name] = max(usage[name], int(value))
    loads, stores, atomics, local = parse_sass(sass)
    return MachineCode(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],  # ptxas puts what it spills on the stack
        local=local,
        shared=kernel.metadata.shared,  # dynamic, so the binary does not know
        num_warps=kernel.metadata.num_warps,
        loads=loads,
        stores=stores,
        atomics=atomics,
        tensor_columns=kernel.metadata.tmem_size or 0,
    )


def parse_sass(sass: str) -> tuple[Counter[int], Counter[int], int, int]:
    """``(loads by width, stores by width, global atomics, local accesses)`` of a listing by ``nvdisasm``."""
    loads, stores, atomics, local = Counter(), Counter(), 0, 0
    for name in re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass, flags=re.MULTILINE):
        opcode, *modifiers = name.split(".")
        # Without a width an access is of 32 bits. Other modifiers hold numbers too (LTC128B): only a whole one counts.
        bits = [int(m.lstrip("US")) for m in modifiers if re.fullmatch(r"[US]?(8|16)|64|128|256", m)]
        width = bits[0] // 8 if bits else 4
        if opcode in ("LDG", "LD", "LDGSTS"):
            loads[width] += 1
        elif opcode in ("STG", "ST"):
            stores[width] += 1
        elif opcode == "UTMALDG" or (opcode == "UBLKCP" and modifiers[:2] == ["S", "G"]):
            loads[16] += 1  # bulk copies move whole pieces of 16 bytes
        elif opcode == "UTMASTG" or opcode == "UBLKCP":
            stores[16] += 1
        elif opcode in ("ATOM", "ATOMG", "RED", "REDG"):
            atomics += 1
        elif opcode in ("LDL", "STL"):
            local += 1
    return loads, stores, atomics, local


def _inspect_amd(kernel: CompiledKernel) -> MachineCode:
    assembly = kernel.asm["amdgcn"]
    usage = {name: int(value) for name, value in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    widths = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2}
    widths |= {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    accesses = {"load": Counter(), "store": Counter()}
    for verb, width in re.findall(
        r"^\s+(?:buffer|global|flat)_(load|store)_(?:lds_)?([a-z]+\d?)", assembly, re.MULTILINE
    ):
        accesses[verb][widths[width]] += 1
    return MachineCode(
        registers=usage["vgpr_count"],  # with the accumulation registers: one file holds both
        spilled=usage["private_segment_fixed_size"] + 4 * usage["vgpr_spill_count"],
        local=len(re.findall(r"^\s+scratch_(?:load|store)_", assembly, re.MULTILINE)),
        shared=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        loads=accesses["load"],
        stores=accesses["store"],
        atomics=len(re.findall(r"^\s+(?:buffer|global|flat)_atomic_", assembly, re.MULTILINE)),
    )


def tool_output(name: str, *arguments: str) -> str:
    """The output of one of the tools in Triton's wheel; an error of the tool is raised."""
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def violations(code: MachineCode, budget: Budget | None) -> list[str]:
    """What is wrong with a kernel's machine code: spills always, and what breaks ``budget`` where there is one.

    Budgets are exact for the Triton they are of; another may take ``OTHER_TRITON`` registers a thread more and spill
    ``OTHER_SPILLS`` bytes.
    """
    found = []
    is_other = not triton.__version__.startswith(f"{BUDGETS_OF}.")
    if (code.spilled or code.local) and not (is_other and code.spilled <= OTHER_SPILLS):
        found.append(f"spills: expected none; got {code.spilled} bytes a thread, {code.local} local accesses")
    if budget is None:
        return found
    margin = OTHER_TRITON if is_other else 0
    if code.registers > budget.registers + margin:
        allowed = f"{budget.registers} + {margin} (Triton {triton.__version__})" if margin else budget.registers
        found.append(f"registers: expected at most {allowed}; got {code.registers}")
    if code.shared > budget.shared:
        found.append(f"shared: expected at most {budget.shared} bytes; got {code.shared}")
    store_bytes = budget.vector_bytes if budget.store_bytes is None else budget.store_bytes
    for kind, widths, expected in (("loads", code.loads, budget.vector_bytes), ("stores", code.stores, store_bytes)):
        if max(widths, default=0) < expected:
            found.append(f"{kind}: expected some of {expected} bytes; got {dict(widths) or 'none'}")
    return found


def case_violations(case: CompileCase, arch: str, compiled: CompiledCase) -> list[str]:
    """:func:`violations` of every kernel of a case. Budgets are NVIDIA's; for AMD only spills count."""
    found = []
    for launch in compiled.launches:
        if launch.kernel_name not in case.budgets:
            found.append(f"{launch.kernel_name}: expected a budget; got none")
            continue
        budget = case.budgets[launch.kernel_name] if TARGETS[arch].backend == "cuda" else None
        found += [f"{launch.kernel_name}: {line}" for line in violations(launch.code, budget)]
    return found
