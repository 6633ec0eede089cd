"""``python -m rsengine.kernels.proof.compile_report``: what every kernel compiles to, and its predicted time.

Needs no GPU: the machine code is read, the times are arithmetic, and the document says so.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from ..jit.case import CompileCase
from .interpreter import traffic
from .offline import TARGETS, CompiledCase, MachineCode, case_violations, compile_case, tool_output

OPS = ("batch_norm", "squeeze_excite", "block_epilogue", "cross_entropy", "ema", "augment")
OUT = Path("docs/compile_report.md")
LAUNCH_SECONDS = 5e-6  # about what one launch costs: below it the bandwidth is not what bounds
LOADED_A_CLOCK = 64  # bytes that one multiprocessor gets from the second-level cache

# Both makers divide a multiprocessor in four, give each quarter 512 registers a lane, and hand them out in eights.
QUARTERS, LANE_REGISTERS, REGISTER_STEP = 4, 512, 8
TENSOR_COLUMNS = 512  # columns of tensor memory in a multiprocessor of sm_100


@dataclass(frozen=True)
class GPU:
    """The GPU that represents an architecture, with its published numbers.

    bandwidth: bytes a second, from source. clock: hertz, about what it runs at under load. Limits of one
    multiprocessor: warps (wavefronts), programs, and bytes of shared memory, with what each program takes of it beside
    its own and in what steps it is handed out.
    """

    name: str
    bandwidth: float
    source: str
    clock: float
    warps: int
    programs: int
    shared: int
    shared_reserved: int
    shared_step: int


GPUS = {
    "sm_80": GPU("A100 SXM 80 GB", 2.039e12, "NVIDIA A100 data sheet", 1.4e9, 64, 32, 164 << 10, 1024, 128),
    "sm_90": GPU("H100 SXM", 3.35e12, "NVIDIA H100 data sheet", 1.7e9, 64, 32, 228 << 10, 1024, 128),
    "sm_100": GPU("B200", 8.0e12, "NVIDIA HGX B200 data sheet", 1.8e9, 64, 32, 228 << 10, 1024, 128),
    "gfx942": GPU("MI300X", 5.3e12, "AMD Instinct MI300X data sheet", 2.1e9, 32, 16, 64 << 10, 0, 512),
}

HEADER = """\
# Compile report: predicted, not measured

Written by `python -m rsengine.kernels.proof.compile_report` (`make compile-report`). Nothing here was run on a GPU;
what was is in [performance.md](performance.md#on-an-h200-measured).

- **Read from machine code** that Triton {triton} made by running the real launchers on operands of the real shape:
  registers, spills, shared memory, the width of global loads and stores. ptxas {ptxas} (sm_80, sm_90),
  {ptxas_blackwell} (sm_100); `cuobjdump` and `nvdisasm` of the same wheel; for gfx942 Triton's LLVM.
- **Counted** by Triton's interpreter from the addresses and masks of every load and store, at a small size: the bytes
  of each large operand. They equal the bytes that must cross the memory bus, or this file is not written.
  A form that has to read an operand twice, because it does not fit on chip, shows `2 ×`. Only the operands named in
  the tables count: biases, (N, C) intermediates and pointer tables do not, and weights count once, though each tile
  of samples after the first reads them again, from the GPU's second-level cache. Weights that products of PyTorch's
  library read are not counted in the interpreter, but taken as read once.
- **Predicted**: the time is the roofline bound: the bytes moved at the real size over the GPU's published bandwidth.
  No kernel can be faster on operands that do not fit in the caches, and none is promised to be as fast. Where it is
  longer (marked †), the time is that in which one multiprocessor loads what the longest program of each launch does, at
  {loaded} bytes a clock: a few programs that each read large weights wait for their own multiprocessor, not for the
  card. Those bytes are counted at the small size, so they are too few where a program's work grows with the batch.
  The library's products are not in it. Under about {launch:.0f} µs (marked *) the
  launch costs more than the bytes, and the number bounds nothing. Occupancy is computed as by NVIDIA's calculator
  (`cuda_occupancy.h`), with the limits from the CUDA programming guide's table of compute capabilities, and for gfx942
  with the limits of LLVM's AMDGPU back end.

Loads and stores: instructions in the code, by the bytes a thread moves with each: `16 B × 4` is four 128-bit ones. A
program on gfx942 has twice as many threads (64 to a wavefront), so each moves half as much at once. Registers and
spills are a thread's (spills in bytes), shared memory is a program's, in bytes. The budgets kept in the cases are
NVIDIA's, and a kernel that breaks one keeps this file from being written. gfx942 has no budgets; where a kernel spills
there, the number is in bold.
"""


def programs_at_once(arch: str, code: MachineCode) -> int:
    """Programs that fit on one multiprocessor; 0 is a kernel that cannot be launched.

    The arithmetic of NVIDIA's occupancy calculator (``cuda_occupancy.h``) with the limits of the CUDA programming
    guide's table of compute capabilities; for AMD the limits are those of LLVM's AMDGPU back end for gfx942.
    """
    gpu = GPUS[arch]
    held = QUARTERS * (LANE_REGISTERS // max(_round_up(code.registers, REGISTER_STEP), REGISTER_STEP))  # warps
    at_once = [
        gpu.warps // code.num_warps,
        # A program's warps are dealt round the quarters, and the fullest must fit.
        held // code.num_warps if _round_up(code.num_warps, QUARTERS) <= held else 0,
        gpu.shared // max(_round_up(code.shared + gpu.shared_reserved, gpu.shared_step), 1),
    ]
    if (
        TARGETS[arch].backend == "cuda" or code.num_warps > 1
    ):  # AMD counts in barriers, which one wavefront does not use
        at_once.append(gpu.programs)
    if code.tensor_columns:
        at_once.append(TENSOR_COLUMNS // code.tensor_columns)
    return min(at_once)


def occupancy(arch: str, code: MachineCode) -> float:
    """Theoretical occupancy: resident warps over the most that a multiprocessor holds."""
    return programs_at_once(arch, code) * code.num_warps / GPUS[arch].warps


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def all_cases() -> dict[str, list[CompileCase]]:
    """The compile cases of every op, by op."""
    return {op: importlib.import_module(f"..jit.{op}", __package__).compile_cases() for op in OPS}


def predicted(arch: str, moved: int, longest: Sequence[int]) -> tuple[float, bool]:
    """``(seconds, whether single programs are the reason)``: what neither the card's bandwidth nor, launch by launch,
    that of one multiprocessor allows to be shorter.

    Args:
        moved: bytes that cross the memory bus.
        longest: of each launch, the bytes that its longest program loads.
    """
    gpu = GPUS[arch]
    card, programs = moved / gpu.bandwidth, sum(longest) / (LOADED_A_CLOCK * gpu.clock)
    return max(card, programs), programs > card


def miscounted(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The streams of one case (of its part of ``traffic``'s answer) whose counted bytes are not the expected ones."""
    return [
        f"{stream}, bytes {verb}: expected {count[f'expected_{verb}']}; got {count[verb]}"
        for stream, count in counts.items()
        for verb in ("read", "written")
        if count[verb] != count[f"expected_{verb}"]
    ]


def op_section(
    op: str,
    cases: Sequence[CompileCase],
    compiled: Mapping[tuple[str, str], CompiledCase],
    counts: Mapping[str, Mapping[str, Any]],
) -> str:
    """Two tables of one op: bytes a case, then machine code a kernel. ``compiled`` is by (case, architecture), and
    ``counts`` is ``traffic``'s answer."""
    moved = [
        "| case | size | bytes moved | an element | read | written | counted at size |",
        "|---|--:|--:|--:|---|---|--:|",
    ]
    rows = [
        "| case | target | bytes moved | predicted µs | kernel | programs × warps "
        "| registers | spills | shared | occupancy | loads | stores |",
        "|---|---|--:|--:|---|--:|--:|--:|--:|--:|---|---|",
    ]
    for case in cases:
        by_arch = {arch: compiled[case.name, arch] for arch in TARGETS if (case.name, arch) in compiled}
        any_arch = next(iter(by_arch.values()))
        read, written = (
            ", ".join(
                f"{name} {f'{term[way]} × ' if term[way] > 1 else ''}{_bytes(term[0])}"
                for name, term in any_arch.streams.items()
                if term[way]
            )
            or "nothing"
            for way in (1, 2)
        )
        moved.append(
            f"| {case.name} | {case.size:,} | {_bytes(any_arch.bytes)} | {any_arch.bytes / any_arch.elements:.4g} B "
            f"| {read} | {written} | {case.small:,} |"
        )
        for arch, each in by_arch.items():
            rows += _rows(case.name, arch, each, counts[case.name]["longest"])
    return "\n".join([f"## {op}", "", *moved, "", *rows, ""])


def _rows(name: str, arch: str, compiled: CompiledCase, longest: Sequence[int]) -> list[str]:
    """A row for each kernel of a case; what belongs to the whole case stands in the first."""
    rows = []
    head = f"| {name} | {arch} | {_bytes(compiled.bytes)} | {_microseconds(*predicted(arch, compiled.bytes, longest))} "
    for launch in compiled.launches:
        code = launch.code
        spills = f"**{code.spilled}**" if code.spilled else "0"
        rows.append(
            f"{head}| `{launch.kernel_name}` | {launch.programs:,} × {code.num_warps} | {code.registers} | {spills} "
            f"| {code.shared:,} | {100 * occupancy(arch, code):.4g}% "
            f"| {_widths(code.loads)} | {_widths(code.stores, code.atomics)} |"
        )
        head = f"| | {arch} | | "
    return rows


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} B"


def _microseconds(seconds: float, is_of_programs: bool) -> str:
    return f"{seconds * 1e6:.3g}{'†' * is_of_programs}{'*' * (seconds < LAUNCH_SECONDS)}"


def _widths(widths: Counter[int], atomics: int = 0) -> str:
    parts = [f"{width} B × {widths[width]}" for width in sorted(widths, reverse=True)]
    return ", ".join(parts + [f"atomic × {atomics}"] * bool(atomics)) or "none"


def _ptxas_version(name: str) -> str:
    return re.search(r"V(\d+\.\d+\.\d+)", tool_output(name, "--version")).group(1)


def document(sections: Iterable[str], archs: Iterable[str]) -> str:
    """The whole report. Holds no date and no path: the same code and tools give the same text."""
    header = HEADER.format(
        triton=triton.__version__,
        ptxas=_ptxas_version("ptxas"),
        ptxas_blackwell=_ptxas_version("ptxas-blackwell"),
        launch=LAUNCH_SECONDS * 1e6,
        loaded=LOADED_A_CLOCK,
    )
    gpus = ["| target | stands for | published bandwidth | source |", "|---|---|--:|---|"]
    for arch in archs:
        gpus.append(f"| {arch} | {GPUS[arch].name} | {GPUS[arch].bandwidth / 1e9:,.0f} GB/s | {GPUS[arch].source} |")
    return "\n".join([header, *gpus, "", *sections])


def main(arguments: list[str] | None = None) -> int:
    """Compile everything, print and write the report. Returns 1, writing nothing, where a budget is broken."""
    parser = argparse.ArgumentParser(prog="python -m rsengine.kernels.proof.compile_report", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="where the report goes (default: %(default)s)")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all of them")
    options = parser.parse_args(arguments)

    sections, wrong = [], []
    counts = traffic()
    for op, cases in all_cases().items():
        compiled = {}
        for case in cases:
            wrong += [f"{case.name}: {line}" for line in miscounted(counts[case.name]["streams"])]
            for arch in options.arch:
                compiled[case.name, arch] = each = compile_case(case, arch)
                if TARGETS[arch].backend == "cuda":
                    wrong += [f"{case.name}, {arch}: {line}" for line in case_violations(case, arch, each)]
            print(f"compiled {op}: {case.name}", flush=True)
        sections.append(op_section(op, cases, compiled, counts))
    text = document(sections, options.arch)
    print(text)
    if wrong:
        print("Not written:", *wrong, sep="\n  ")
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
