"""Every kernel at its real shapes, compiled for GPUs this machine does not have, and what its machine code says."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets kernels and cannot compile them", allow_module_level=True)

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from rsengine.config import load_recipe
from rsengine.engine.build import build_model
from rsengine.kernels.jit import augment, block_epilogue
from rsengine.kernels.jit.case import Budget, CompileCase, Stream
from rsengine.kernels.proof import compile_report, interpreter, offline

CASES = {case.name: case for cases in compile_report.all_cases().values() for case in cases}


@cache  # a case is compiled once, for its own test and for the report's
def compiled(name: str, arch: str) -> offline.CompiledCase:
    return offline.compile_case(CASES[name], arch)


NVIDIAS = [
    pytest.param(arch, marks=[] if arch == "sm_90" else pytest.mark.thorough)
    for arch in offline.TARGETS
    if arch.startswith("sm_")
]


@pytest.mark.parametrize("arch", NVIDIAS)
@pytest.mark.parametrize("name", CASES)
def test_machine_code_keeps_to_its_budget(name, arch):
    result = compiled(name, arch)
    assert not offline.case_violations(CASES[name], arch, result)
    for launch in result.launches:
        assert compile_report.programs_at_once(arch, launch.code) >= 1, f"{launch.kernel_name} cannot be launched"


# Every form of every op, of maps at the shapes that compile fastest.
SHORT = [name for name in CASES if re.search(r"bfloat16, (256x8x8|256x16x16|2048x1x1)$|^(?!batch_norm|squeeze)", name)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHORT else pytest.mark.thorough) for name in CASES]
)
def test_compiles_for_one(name):
    """One image, row or parameter: an argument of 1 becomes a constant without methods, but not in the interpreter."""
    with offline.compiling_for("sm_90") as launches:
        CASES[name].launch(1)
    assert launches


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_compiles_for_amd_without_spills(name):
    result = compiled(name, "gfx942")
    assert not offline.case_violations(CASES[name], "gfx942", result)
    for launch in result.launches:
        assert compile_report.programs_at_once("gfx942", launch.code) >= 1, f"{launch.kernel_name} cannot be launched"


@pytest.mark.parametrize("case", augment.compile_cases(), ids=lambda case: case.name)
def test_augmentation_rounds_products_and_sums_by_themselves(case):
    """As Pillow does: a fused multiply-add would move a pixel by a level now and then."""
    with offline.compiling_for("sm_90") as launches:
        case.launch(case.size)
    ptx = launches[0].kernel.asm["ptx"]
    assert not re.findall(r"fma\.rn\S*", ptx)
    if "AutoAugment" in case.name:
        assert "mul.rn.f32" in ptx and "mul.rn.f64" in ptx and "div.rn.f64" in ptx


def test_case_names_are_distinct():
    assert len(CASES) == sum(len(cases) for cases in compile_report.all_cases().values())


def test_the_cases_of_the_block_epilogue_are_as_wide_as_the_networks():
    with torch.device("meta"):
        network = build_model(load_recipe("report-1"), 10)
    widths = {module.se.reduce.weight.shape for module in network.modules() if hasattr(module, "se")}
    assert len(widths) == 4
    assert {channels / hidden for hidden, channels in widths} == {block_epilogue.SQUEEZE}


def launched(case: CompileCase, size: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: names.append(self.fn.__name__))
    case.launch(size)
    return names


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_counted_on_the_kernels_that_are_compiled(name, monkeypatch):
    case = CASES[name]
    assert launched(case, case.small, monkeypatch) == launched(case, case.size, monkeypatch)


@pytest.fixture(scope="module")
def traffic():
    return interpreter.traffic()


@pytest.mark.slow
@pytest.mark.thorough
def test_bytes_counted_equal_the_expected(traffic):
    assert set(traffic) == set(CASES)
    wrong = {name: compile_report.miscounted(counts["streams"]) for name, counts in traffic.items()}
    assert not {name: lines for name, lines in wrong.items() if lines}


@pytest.mark.thorough
def test_the_longest_program_of_each_launch_is_seen(traffic):
    """Of the single pass the one program reads the weights, (64, 256) twice in float32, beside its maps."""
    single, split = (
        "squeeze_excite_residual forward, bfloat16, 256x8x8",
        "squeeze_excite_residual forward, bfloat16, 2048x1x1",
    )
    (loaded,) = traffic[single]["longest"]
    assert 2 * 64 * 256 * 4 < loaded < 2 * 2 * 64 * 256 * 4
    assert len(traffic[split]["longest"]) == 4
    assert max(traffic[split]["longest"]) < 2**19  # of 8 MB


def test_a_long_program_is_what_a_prediction_waits_for():
    gpu = compile_report.GPUS["sm_90"]
    assert compile_report.predicted("sm_90", 10**8, [10**5] * 2) == (10**8 / gpu.bandwidth, False)
    seconds, is_of_programs = compile_report.predicted("sm_90", 10**6, [2**22, 2**22])
    assert is_of_programs and seconds == 2**23 / (64 * gpu.clock) and 7e-5 < seconds < 8e-5


def test_miscounted_bytes_are_named():
    counts = {"x": {"read": 8, "expected_read": 4, "written": 0, "expected_written": 0}}
    assert compile_report.miscounted(counts) == ["x, bytes read: expected 4; got 8"]


@pytest.mark.slow
@pytest.mark.thorough
def test_the_committed_report_is_current(traffic):
    """Every table of docs/compile_report.md is what the kernels compile to now."""
    report = (Path(__file__).parents[3] / compile_report.OUT).read_text()
    if f"Triton {triton.__version__} " not in report:
        pytest.skip(f"the report was written with another Triton than {triton.__version__}")
    for op, cases in compile_report.all_cases().items():
        by_arch = {(case.name, arch): compiled(case.name, arch) for case in cases for arch in offline.TARGETS}
        lines = compile_report.op_section(op, cases, by_arch, traffic).splitlines()
        missing = [line for line in lines if line not in report]
        assert not missing, f"run make compile-report; not in {compile_report.OUT}: {missing}"


# Planted kernels: the checks must be able to fail.


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n).to(tl.float32)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def _hoarding_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Holds 2 * BLOCK numbers: every one of the first tile is needed until the sum over the second is known."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    total = tl.sum(x, axis=0)
    tl.store(y_ptr + offs, x * total)


@triton.jit
def _total_kernel(x_ptr, total_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total_ptr, tl.sum(tl.load(x_ptr + offs), axis=0))


def machine_code(arch, kernel, *args, **kwargs) -> offline.MachineCode:
    with offline.compiling_for(arch) as launches:
        kernel[(1,)](*args, **kwargs)
    return offline.inspect(launches[0].kernel)


LAX = Budget(255, 1 << 20, 0)


@pytest.mark.parametrize("arch", offline.TARGETS)
def test_a_spill_is_seen(arch):
    tile = 32_768  # 1,024 registers a thread of one warp, 512 of one wavefront
    code = machine_code(arch, _hoarding_kernel, torch.empty(tile), torch.empty(tile), BLOCK=tile, num_warps=1)
    assert code.spilled > 0
    assert code.local > 0
    assert offline.violations(code, LAX)[0].startswith("spills: expected none; got ")
    assert offline.violations(code, None)


@pytest.mark.parametrize("arch", [arch for arch in offline.TARGETS if arch.startswith("sm_")])
@pytest.mark.parametrize(("dtype", "start", "width"), [
    (torch.float32, 0, 16),
    (torch.bfloat16, 0, 16),
    (torch.float32, 1, 4),  # a view that begins 4 bytes into its storage
    (torch.bfloat16, 1, 2),
])  # fmt: skip
def test_width_follows_the_alignment_of_the_operands(arch, dtype, start, width):
    x, y = (torch.empty(4096 + start, dtype=dtype)[start:] for _ in range(2))
    code = machine_code(arch, _copy_kernel, x, y, 4096, BLOCK=1024, num_warps=4)
    assert set(code.loads) == set(code.stores) == {width}
    assert bool(offline.violations(code, Budget(255, 0, 16))) == (width < 16)


def test_width_follows_the_alignment_on_amd():
    x, y = torch.empty(4096), torch.empty(4096)
    assert machine_code("gfx942", _copy_kernel, x, y, 4096, BLOCK=1024, num_warps=4).loads == Counter({16: 1})
    x, y = torch.empty(4097)[1:], torch.empty(4097)[1:]
    assert set(machine_code("gfx942", _copy_kernel, x, y, 4096, BLOCK=1024, num_warps=4).loads) == {4}


@pytest.mark.parametrize("arch", offline.TARGETS)
def test_atomics_and_shared_memory_are_seen(arch):
    code = machine_code(arch, _total_kernel, torch.empty(1024), torch.zeros(1), BLOCK=1024, num_warps=4)
    assert code.atomics == 1
    assert code.shared > 0
    assert not code.stores


def test_violations_name_what_is_expected_and_given(monkeypatch):
    monkeypatch.setattr(triton, "__version__", f"{offline.BUDGETS_OF}.0")
    code = offline.MachineCode(100, 0, 0, 2048, 4, Counter({16: 1}), Counter({4: 2}), 0)
    assert offline.violations(code, Budget(100, 2048, 16, store_bytes=4)) == []
    assert offline.violations(code, Budget(99, 2047, 16)) == [
        "registers: expected at most 99; got 100",
        "shared: expected at most 2047 bytes; got 2048",
        "stores: expected some of 16 bytes; got {4: 2}",
    ]


@pytest.mark.parametrize("version", ["3.6.0", f"{offline.BUDGETS_OF}0.0"])
def test_another_triton_may_take_some_registers_more(version, monkeypatch):
    code = offline.MachineCode(124, 0, 0, 0, 4, Counter(), Counter(), 0)
    spilling = replace(code, spilled=8, local=2)
    monkeypatch.setattr(triton, "__version__", version)
    assert offline.violations(code, Budget(92, 0, 0)) == offline.violations(spilling, Budget(92, 0, 0)) == []
    assert offline.violations(code, Budget(91, 0, 0)) == [
        f"registers: expected at most 91 + 32 (Triton {version}); got 124"
    ]
    monkeypatch.setattr(triton, "__version__", f"{offline.BUDGETS_OF}.2")
    assert offline.violations(code, Budget(123, 0, 0)) == ["registers: expected at most 123; got 124"]
    assert offline.violations(spilling, None) == ["spills: expected none; got 8 bytes a thread, 2 local accesses"]


def test_the_budgets_are_of_the_pinned_triton_and_the_reports():
    root = Path(__file__).parents[3]
    pins = (root / "constraints.txt").read_text().splitlines()
    assert any(line.startswith(f"triton=={offline.BUDGETS_OF}.") for line in pins)
    assert f"Triton {offline.BUDGETS_OF}." in (root / compile_report.OUT).read_text()


def test_a_kernel_without_a_budget_is_a_violation():
    def launch(size):
        x, y = torch.empty(size), torch.empty(size)
        _copy_kernel[(triton.cdiv(size, 1024),)](x, y, size, BLOCK=1024)
        return {"x": Stream([x], 1, 0), "y": Stream([y], 0, 1)}

    case = CompileCase("copy", launch, 4096, 8, {}, eager=lambda kernels, size: lambda: None)
    result = offline.compile_case(case, "sm_80")
    assert offline.case_violations(case, "sm_80", result) == ["_copy_kernel: expected a budget; got none"]
    assert (result.bytes, result.elements, result.launches[0].programs) == (2 * 4 * 4096, 4096, 4)


def test_sass_is_read_by_whole_modifiers():
    listing = """
        /*0000*/                   LDG.E.LTC128B.64.CONSTANT R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E.U16 R4, desc[UR4][R2.128] ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R27], desc[UR18][R4.64], P0 ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/             @!UP1 STG.E desc[UR4][R2.64], R4 ;
        /*0050*/                   LDG.E.ENL2.256 R4, R8, desc[UR4][R2.64] ;
        /*0060*/                   STG.E.U8 desc[UR4][R2.64], R4 ;
        /*0070*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R5 ;
        /*0080*/                   LDL.LU R4, [R1+0x4] ;
        /*0090*/                   LDS.128 R4, [R1] ;
        /*10a0*/                   LDC.64 R2, c[0x0][0x160] ;
    """
    assert offline.parse_sass(listing) == ({8: 1, 2: 1, 16: 1, 32: 1}, {4: 1, 1: 1}, 1, 1)


def test_the_driver_is_put_back():
    before = JITFunction.run, driver._active, torch.version.hip
    with pytest.raises(ZeroDivisionError), offline.compiling_for("gfx942"):
        assert driver.active.get_current_target().arch == "gfx942"
        assert torch.version.hip
        raise ZeroDivisionError
    assert (JITFunction.run, driver._active, torch.version.hip) == before
    with pytest.raises(ValueError, match="arch: expected one of sm_80"), offline.compiling_for("sm_12"):
        pass


# Occupancy

HEADER = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/include/cuda_occupancy.h"
CALCULATOR = r"""
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include "cuda_occupancy.h"
int main(int argc, char** argv) {
  int major, shared_kib, registers, warps, shared;
  while (scanf("%d %d %d %d %d", &major, &shared_kib, &registers, &warps, &shared) == 5) {
    cudaOccDeviceProp gpu = {major, 0, 1024, 2048, 65536, 65536, 32, 48 << 10, (size_t)shared_kib << 10, 1,
                             (size_t)(shared_kib - 1) << 10, 1024};
    cudaOccFuncAttributes kernel = {INT_MAX, registers, 0, PARTITIONED_GC_OFF, FUNC_SHMEM_LIMIT_OPTIN, INT_MAX, 0};
    cudaOccDeviceState state = {CACHE_PREFER_SHARED, 100};
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &gpu, &kernel, &state, warps * 32, shared)) return 1;
    printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
"""
MAJOR = {"sm_80": 8, "sm_90": 9, "sm_100": 10}


def code_using(registers: int, warps: int, shared: int, columns: int = 0) -> offline.MachineCode:
    return offline.MachineCode(registers, 0, 0, shared, warps, Counter(), Counter(), 0, columns)


@pytest.mark.skipif(shutil.which("cc") is None or not HEADER.exists(), reason="needs a C compiler and Triton's headers")
@pytest.mark.parametrize("arch", MAJOR)
def test_occupancy_is_that_of_nvidias_calculator(arch, tmp_path):
    (tmp_path / "calculator.c").write_text(CALCULATOR)
    program = tmp_path / "calculator"
    subprocess.run(["cc", "-I", HEADER.parent, tmp_path / "calculator.c", "-o", program], check=True)
    grid = [
        (registers, warps, shared)
        for registers in (16, 32, 33, 40, 41, 64, 65, 72, 96, 100, 128, 129, 168, 255)
        for warps in (1, 2, 3, 4, 8, 16, 32)
        for shared in (0, 1, 1024, 9_000, 20_480, 49_152, 73_728, 81_920, 110_592, 166_912)
    ]
    lines = [f"{MAJOR[arch]} {compile_report.GPUS[arch].shared >> 10} {r} {w} {s}" for r, w, s in grid]
    answer = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    expected = [int(line) for line in answer.split()]
    assert [compile_report.programs_at_once(arch, code_using(*point)) for point in grid] == expected


@pytest.mark.parametrize(("registers", "warps", "shared", "expected"), [
    (32, 8, 0, 1.0),
    (40, 8, 0, 0.75),  # 6 programs of 8 warps: registers
    (64, 4, 0, 0.5),
    (255, 4, 0, 0.125),
    (32, 1, 0, 0.5),  # 32 programs is the most
    (32, 4, 81_920, 0.125),  # 2 programs in 164 KiB with 1 KiB reserved for each
    (32, 4, 166_913, 0.0),  # 163 KiB and a byte: cannot be launched
])  # fmt: skip
def test_occupancy_of_an_a100(registers, warps, shared, expected):
    """Values of NVIDIA's calculator, for machines without a compiler to ask it."""
    assert compile_report.occupancy("sm_80", code_using(registers, warps, shared)) == expected


def test_tensor_memory_limits_occupancy():
    assert compile_report.programs_at_once("sm_100", code_using(32, 4, 0, 256)) == 2


def test_occupancy_on_amd_is_llvms():
    """LLVM prints the wavefronts a SIMD holds, of at most 8, for the registers it has given."""
    for tile in (1024, 8192, 16_384):
        with offline.compiling_for("gfx942") as launches:
            _copy_kernel[(1,)](torch.empty(tile), torch.empty(tile), tile, BLOCK=tile, num_warps=4)
        comment = launches[0].kernel.asm["amdgcn"].partition("; Occupancy: ")[2].split()[0]
        assert compile_report.occupancy("gfx942", offline.inspect(launches[0].kernel)) == int(comment) / 8
