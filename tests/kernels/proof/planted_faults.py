"""Small kernels with one fault each, and sound ones, for ``test_interpreter.py``.

``TRITON_INTERPRET=1 python -m tests.kernels.proof.planted_faults`` runs every function of ``CASES`` under the strict
interpreter and prints JSON: what each raised, or "passed".
"""

import json

import torch
import triton
import triton.language as tl

from rsengine.kernels.proof import interpreter

BLOCK = 64


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, shift, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + offs, tl.load(x_ptr + offs + shift, mask=mask).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def truncating_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(y_ptr + offs, x.to(tl.bfloat16, fp_downcast_rounding="rtz"), mask=offs < n)


@triton.jit
def add_raw_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x + x)


@triton.jit
def sum_raw_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.reduce(tl.load(x_ptr + tl.arange(0, BLOCK)), 0, larger))


@triton.jit
def larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def scatter_kernel(index_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.load(index_ptr + offs), offs.to(tl.float32))


@triton.jit
def one_cell_kernel(y_ptr):
    tl.store(y_ptr, tl.program_id(0).to(tl.float32))


@triton.jit
def rotate_kernel(x_ptr, shift, n, BLOCK: tl.constexpr):
    """Read another program's block, write one's own: which value is read depends on who comes first."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (offs + shift) % n)
    tl.store(x_ptr + offs, x + 1)


@triton.jit
def read_by_many_kernel(x_ptr, y_ptr):
    """Every program reads x[0]; the last one to look it over writes it."""
    pid = tl.program_id(0)
    x = tl.load(x_ptr)
    tl.store(y_ptr + pid, x)
    tl.store(x_ptr, x, mask=pid == 3)


@triton.jit
def exchange_kernel(scratch_ptr, y_ptr, HAS_BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    base = scratch_ptr + tl.program_id(0) * BLOCK
    tl.store(base + offs, offs.to(tl.float32))
    if HAS_BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + tl.program_id(0) * BLOCK + offs, tl.load(base + BLOCK - 1 - offs))


@triton.jit
def ticket_kernel(counter_ptr, y_ptr):
    tl.store(y_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


@triton.jit
def mixed_atomic_kernel(counter_ptr, y_ptr):
    tl.atomic_add(counter_ptr, 1)
    tl.debug_barrier()
    tl.store(y_ptr + tl.program_id(0), tl.load(counter_ptr))


@triton.jit
def assert_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.device_assert(tl.load(x_ptr + tl.arange(0, BLOCK)) >= 0, "negative")


@triton.jit
def table_kernel(table_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    base = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr + tl.program_id(0) * BLOCK + offs, tl.load(base + offs))


@triton.jit
def halves_kernel(x_ptr, half_ptr, y_ptr, BLOCK: tl.constexpr):
    pid, offs = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(x_ptr + pid * BLOCK + offs, (pid + 0.1 * offs).to(tl.float32))
    tl.debug_barrier()
    tl.store(y_ptr + pid * BLOCK + offs, tl.load(half_ptr + pid * 2 * BLOCK + offs))


@triton.jit
def transpose_kernel(x_ptr, y_ptr, rows, columns, BLOCK: tl.constexpr):
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (offs_m < rows) & (offs_n < columns)
    tl.store(y_ptr + offs_n * rows + offs_m, tl.load(x_ptr + offs_m * columns + offs_n, mask=mask), mask=mask)


@triton.jit
def dot_kernel(a_ptr, b_ptr, y_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(y_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), input_precision=PRECISION))


@triton.jit
def far_kernel(x_ptr, stride, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK) * stride
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + offs, mask=offs < 0))


def blocks(n):
    return (triton.cdiv(n, BLOCK),)


def bf16_arithmetic():
    x = torch.ones(BLOCK, dtype=torch.bfloat16)
    add_raw_kernel[(1,)](x, torch.empty_like(x), BLOCK=BLOCK)


def bf16_reduction():
    x = torch.ones(BLOCK, dtype=torch.bfloat16)
    sum_raw_kernel[(1,)](x, torch.empty_like(x), BLOCK=BLOCK)


def hard_floats():
    """Every float32 whose upper half is one of all 65,536 and whose lower half is where rounding turns, as float32."""
    upper = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (upper + lower).reshape(-1)
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def bf16_casts_are_torchs():
    x = hard_floats()
    y, back = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x)
    copy_kernel[(triton.cdiv(x.numel(), 4096),)](x, y, x.numel(), 0, BLOCK=4096)
    copy_kernel[(triton.cdiv(x.numel(), 4096),)](y, back, x.numel(), 0, BLOCK=4096)
    nan = x.isnan()
    assert torch.equal(y.isnan(), nan)
    assert torch.equal(y[~nan].view(torch.int16), x.bfloat16()[~nan].view(torch.int16))
    assert torch.equal(back[~nan].view(torch.int32), y.float()[~nan].view(torch.int32)) and back[nan].isnan().all()


def truncating_cast():
    x = torch.rand(BLOCK)
    y = torch.empty(BLOCK, dtype=torch.bfloat16)
    truncating_kernel[(1,)](x, y, BLOCK, BLOCK=BLOCK)
    assert torch.equal(y, x.bfloat16()), "not rounded to nearest"


def out_of_bounds_load():
    copy_kernel[blocks(100)](torch.rand(100), torch.empty(100), 100, 1, BLOCK=BLOCK)


def out_of_bounds_store():
    copy_kernel[blocks(100)](torch.rand(100), torch.empty(99), 100, 0, BLOCK=BLOCK)


def out_of_bounds_into_a_neighbour():
    both = torch.rand(200)
    copy_kernel[blocks(100)](both[:100], torch.empty(100), 100, 50, BLOCK=BLOCK)


def undeclared_pointer():
    x = torch.rand(BLOCK)
    table_kernel[(1,)](torch.tensor([x.data_ptr()]), torch.empty(BLOCK), BLOCK=BLOCK)


def out_of_bounds_through_a_table():
    xs = [torch.rand(BLOCK), torch.rand(BLOCK - 1)]
    with interpreter.allow(*xs):
        table_kernel[(2,)](torch.tensor([x.data_ptr() for x in xs]), torch.empty(2 * BLOCK), BLOCK=BLOCK)


def empty_tensor_load():
    copy_kernel[(1,)](torch.empty(0), torch.empty(BLOCK), BLOCK, 0, BLOCK=BLOCK)


def misaligned_load():
    x = torch.rand(BLOCK + 1)
    table = torch.tensor([x.data_ptr() + 2])
    with interpreter.allow(x):
        table_kernel[(1,)](table, torch.empty(BLOCK), BLOCK=BLOCK)


def double_store():
    index = torch.arange(BLOCK)
    index[5] = 40
    scatter_kernel[(1,)](index, torch.empty(BLOCK), BLOCK=BLOCK)


def write_write_race():
    one_cell_kernel[(2,)](torch.empty(1))


def read_write_race():
    rotate_kernel[(4,)](torch.zeros(4 * BLOCK), BLOCK, 4 * BLOCK, BLOCK=BLOCK)


def read_by_many_written_by_one():
    read_by_many_kernel[(4,)](torch.zeros(1), torch.empty(4))


def missing_barrier():
    exchange_kernel[(2,)](torch.empty(2 * BLOCK), torch.empty(2 * BLOCK), HAS_BARRIER=False, BLOCK=BLOCK)


def int32_overflow():
    far_kernel[(1,)](torch.zeros(BLOCK), 1 << 28, BLOCK=BLOCK)


def order_dependence():
    tickets = torch.empty(16, dtype=torch.int32)
    ticket_kernel[(16,)](torch.zeros(1, dtype=torch.int32), tickets)
    assert sorted(tickets.tolist()) == list(range(16))
    assert tickets.tolist() == list(range(16)), "the order of the programs shows in the result"


def atomic_and_plain():
    mixed_atomic_kernel[(2,)](torch.zeros(1, dtype=torch.int32), torch.empty(2, dtype=torch.int32))


def device_assert():
    assert_kernel[(1,)](torch.tensor([-1.0] + [1.0] * (BLOCK - 1)), BLOCK=BLOCK)


def tf32_dot():
    a, b = torch.rand(16, 16), torch.rand(16, 16)
    y = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, y, PRECISION="tf32", BLOCK=16)
    assert torch.allclose(y, a @ b, rtol=1e-6), "dropped bits"


def an_error_does_not_stick():
    for fault in (write_write_race, out_of_bounds_load):
        try:
            fault()
        except (interpreter.RaceError, IndexError):
            masked_copy_counts()


def masked_copy_counts():
    x, y = torch.rand(1000), torch.empty(1000, dtype=torch.bfloat16)
    with interpreter.count_traffic() as outer:
        copy_kernel[blocks(1000)](x, y, 1000, 0, BLOCK=BLOCK)
        with interpreter.count_traffic() as inner:
            copy_kernel[blocks(700)](x, y, 700, 0, BLOCK=BLOCK)
    copy_kernel[blocks(1000)](x, y, 1000, 0, BLOCK=BLOCK)
    assert torch.equal(y, x.bfloat16())
    assert (outer.read(x), outer.written(x), outer.read(y), outer.written(y)) == (6800, 0, 0, 3400)
    assert (inner.read(x), inner.written(y)) == (2800, 1400)


def views_keep_their_bounds():
    storage = torch.rand(300)
    x, y = storage[100:200], storage[200:300]
    copy_kernel[blocks(100)](x, y, 100, 0, BLOCK=BLOCK)
    assert torch.equal(x, y)


def in_place():
    x = torch.zeros(4 * BLOCK)
    rotate_kernel[(4,)](x, 0, 4 * BLOCK, BLOCK=BLOCK)
    assert (x == 1).all()


def one_storage_in_two_widths():
    """Programs write float32 and read their own halves: the finer view must not make neighbours collide."""
    x, y = torch.empty(128), torch.empty(128, dtype=torch.int16)
    halves_kernel[(2,)](x, x.view(torch.int16), y, BLOCK=BLOCK)
    assert torch.equal(y, x.view(torch.int16).reshape(2, -1)[:, :BLOCK].reshape(-1))


def halves_of_another_program():
    x, y = torch.empty(3 * BLOCK), torch.empty(2 * BLOCK, dtype=torch.int16)
    halves_kernel[(2,)](x, x.view(torch.int16)[BLOCK + 2 :], y, BLOCK=BLOCK)


def transpose():
    x, y = torch.rand(70, 33), torch.empty(33, 70)
    transpose_kernel[(3, 2)](x, y, 70, 33, BLOCK=32)
    assert torch.equal(y, x.T)


def barrier():
    y = torch.empty(2 * BLOCK)
    exchange_kernel[(2,)](torch.empty(2 * BLOCK), y, HAS_BARRIER=True, BLOCK=BLOCK)
    assert torch.equal(y, torch.arange(BLOCK - 1.0, -1, -1).repeat(2))


def pointer_table():
    xs = [torch.rand(BLOCK) for _ in range(3)]
    y = torch.empty(3 * BLOCK)
    with interpreter.allow(*xs), interpreter.count_traffic() as traffic:
        table_kernel[(3,)](torch.tensor([x.data_ptr() for x in xs]), y, BLOCK=BLOCK)
    assert torch.equal(y, torch.cat(xs)) and traffic.read(xs[1]) == 4 * BLOCK


def bf16_dot_is_exact():
    a, b = (torch.randint(-50, 50, (16, 16)).bfloat16() for _ in range(2))
    y = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, y, PRECISION="tf32", BLOCK=16)
    assert torch.equal(y, a.float() @ b.float())


def ieee_dot():
    a, b = torch.rand(16, 16), torch.rand(16, 16)
    y = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, y, PRECISION="ieee", BLOCK=16)
    assert torch.allclose(y, a @ b, rtol=1e-6)


def nothing_at_all():
    copy_kernel[(1,)](torch.empty(0), torch.empty(0), 0, 0, BLOCK=BLOCK)
    x, y = torch.tensor(3.0), torch.empty(())
    copy_kernel[(1,)](x, y, 1, 0, BLOCK=BLOCK)
    assert y == 3


FAULTS = (
    bf16_arithmetic,
    bf16_reduction,
    truncating_cast,
    out_of_bounds_load,
    out_of_bounds_store,
    out_of_bounds_into_a_neighbour,
    out_of_bounds_through_a_table,
    undeclared_pointer,
    empty_tensor_load,
    misaligned_load,
    double_store,
    write_write_race,
    read_write_race,
    read_by_many_written_by_one,
    halves_of_another_program,
    missing_barrier,
    order_dependence,
    atomic_and_plain,
    device_assert,
    int32_overflow,
    tf32_dot,
)
SOUND = (
    an_error_does_not_stick,
    bf16_casts_are_torchs,
    masked_copy_counts,
    views_keep_their_bounds,
    in_place,
    one_storage_in_two_widths,
    transpose,
    barrier,
    pointer_table,
    bf16_dot_is_exact,
    ieee_dot,
    nothing_at_all,
)


def outcome(case):
    torch.manual_seed(0)
    try:
        case()
    except Exception as error:  # whatever it is, it is the result
        return f"{type(error).__name__}: {error}"
    return "passed"


if __name__ == "__main__":
    interpreter.install()
    print(json.dumps({case.__name__: outcome(case) for case in (*FAULTS, *SOUND)}))
