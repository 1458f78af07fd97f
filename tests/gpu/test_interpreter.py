"""The patched interpreter itself: bfloat16 as torch computes it, and every kind of planted bug caught."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from ragged_batches import ragged_batch, shapes
from torch import Tensor
from triton_interpreter import program_order
from triton_memory import OutOfBounds, Race

BF16 = torch.bfloat16
BINARY = ["+", "-", "*", "/", "max", "min", "<", "<=", "==", "!="]


def hard_values(count: int, seed: int = 0) -> Tensor:
    """bfloat16 of every magnitude: random bit patterns, so subnormals, infinities and NaN too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, (count,), generator=generator, dtype=torch.int16).view(BF16)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# -- bfloat16 --------------------------------------------------------------------------------------------------


@triton.jit
def _binary_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "+":
        out = x + y
    elif OP == "-":
        out = x - y
    elif OP == "*":
        out = x * y
    elif OP == "/":
        out = x / y
    elif OP == "max":
        out = tl.maximum(x, y)
    elif OP == "min":
        out = tl.minimum(x, y)
    elif OP == "<":
        out = (x < y).to(tl.bfloat16)
    elif OP == "<=":
        out = (x <= y).to(tl.bfloat16)
    elif OP == "==":
        out = (x == y).to(tl.bfloat16)
    else:
        out = (x != y).to(tl.bfloat16)
    tl.store(out_ptr + i, out)


@pytest.mark.parametrize("op", BINARY)
def test_bfloat16_arithmetic_and_comparisons(op: str) -> None:
    x, y = hard_values(4096), hard_values(4096, seed=1)
    y[::5] = x[::5]
    plain = {
        "+": torch.add,
        "-": torch.sub,
        "*": torch.mul,
        "/": lambda a, b: (a.float() / b.float()).to(BF16),
        "max": lambda a, b: torch.where(a.isnan(), b, torch.where(b.isnan(), a, a.maximum(b))),  # NaN loses
        "min": lambda a, b: torch.where(a.isnan(), b, torch.where(b.isnan(), a, a.minimum(b))),
        "<": lambda a, b: (a < b).to(BF16),
        "<=": lambda a, b: (a <= b).to(BF16),
        "==": lambda a, b: (a == b).to(BF16),
        "!=": lambda a, b: (a != b).to(BF16),
    }[op]
    out = torch.empty_like(x)
    _binary_kernel[(1,)](x, y, out, OP=op, N=4096)
    assert_same_bits(out, plain(x, y))


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int32, torch.int8])
def test_casts_to_bfloat16_round_to_nearest_even(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    x = bits.view(torch.float32) if dtype.is_floating_point else bits
    x = x.to(dtype)
    if dtype == torch.float32:
        x[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38])  # ties, and past the largest
    out = torch.empty(4096, dtype=BF16)
    _cast_kernel[(1,)](x, out, N=4096)
    assert_same_bits(out, x.float().to(BF16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, BF16])
def test_casts_from_bfloat16(dtype: torch.dtype) -> None:
    x = hard_values(4096)
    out = torch.empty(4096, dtype=dtype)
    _cast_kernel[(1,)](x, out, N=4096)
    assert_same_bits(out, x.to(dtype))


@triton.jit
def _bits_kernel(x_ptr, out_ptr, back_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    bits = tl.load(x_ptr + i).to(tl.int16, bitcast=True)
    tl.store(out_ptr + i, bits)
    tl.store(back_ptr + i, bits.to(tl.bfloat16, bitcast=True))


def test_bitcasts() -> None:
    x = torch.randn(256).to(BF16)
    out, back = torch.empty(256, dtype=torch.int16), torch.empty_like(x)
    _bits_kernel[(1,)](x, out, back, N=256)
    assert torch.equal(out, x.view(torch.int16))
    assert torch.equal(back, x)


@triton.jit
def _constants_kernel(x_ptr, out_ptr, scale, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    filled = tl.full([N], 0.3, tl.bfloat16) + tl.zeros([N], tl.bfloat16)
    tl.store(out_ptr + i, (x * 0.1 + filled).to(tl.float32))  # a literal takes the other operand's type
    tl.store(out_ptr + N + i, tl.where(i % 2 == 0, -x, tl.abs(x)) * scale)  # an argument is a float32


def test_bfloat16_with_literals_and_float_arguments() -> None:
    x, out = torch.randn(64).to(BF16), torch.empty(128)
    _constants_kernel[(1,)](x, out, 0.3, N=64)
    literal = (x.float() * torch.tensor(0.1, dtype=BF16)).to(BF16) + torch.tensor(0.3, dtype=BF16)
    chosen = torch.where(torch.arange(64) % 2 == 0, -x, x.abs())
    assert_same_bits(out[:64], literal.float())
    assert_same_bits(out[64:], chosen.float() * torch.tensor(0.3))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[:, None] * K + k[None, :])
    c = tl.load(c_ptr + m[:, None] * N + n[None, :])
    out = tl.dot(a, tl.trans(b), c, input_precision="ieee", out_dtype=c.dtype)
    tl.store(out_ptr + m[:, None] * N + n[None, :], out)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_dot_sums_exactly(dtype: torch.dtype) -> None:
    a, b, c = torch.randn(16, 64).to(dtype), torch.randn(32, 64).to(dtype), torch.randn(16, 32)
    out = torch.empty(16, 32)
    _dot_kernel[(1,)](a, b, c, out, M=16, N=32, K=64)
    assert_same_bits(out, (a.double() @ b.double().T + c.double()).float())


def test_dot_of_int8() -> None:
    a, b = (torch.randint(-127, 128, (n, 64), dtype=torch.int8) for n in (16, 32))
    c, out = torch.zeros(16, 32, dtype=torch.int32), torch.empty(16, 32, dtype=torch.int32)
    _dot_kernel[(1,)](a, b, c, out, M=16, N=32, K=64)
    assert torch.equal(out, a.int() @ b.int().T)


def test_a_row_of_a_dot_does_not_depend_on_the_others() -> None:
    a, b = torch.randn(64, 64), torch.randn(32, 64)
    whole = torch.empty(64, 32)
    _dot_kernel[(1,)](a, b, torch.zeros(64, 32), whole, M=64, N=32, K=64)
    for rows in (1, 2, 16, 32):
        part = torch.empty(rows, 32)
        _dot_kernel[(1,)](a[:rows].contiguous(), b, torch.zeros(rows, 32), part, M=rows, N=32, K=64)
        assert torch.equal(part, whole[:rows])


@triton.jit
def _reduce_kernel(x_ptr, sum_ptr, max_ptr, argmax_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    tl.store(sum_ptr + m, tl.sum(x, axis=1))
    tl.store(max_ptr + m, tl.max(x, axis=1))
    tl.store(argmax_ptr + m, tl.argmax(x, axis=1))
    tl.device_assert(tl.sum(x, axis=1, keep_dims=True).shape[1] == 1, "keep_dims")


def test_bfloat16_reductions() -> None:
    x = torch.randn(8, 64).to(BF16)
    total, top, where = (
        torch.empty(8, dtype=BF16),
        torch.empty(8, dtype=BF16),
        torch.empty(8, dtype=torch.int32),
    )
    _reduce_kernel[(1,)](x, total, top, where, M=8, N=64)
    assert_same_bits(top, x.amax(1))
    assert torch.equal(where.long(), x.float().argmax(1))
    exact, magnitude = x.double().sum(1), x.double().abs().sum(1)
    assert ((total.double() - exact).abs() <= 6 * 2**-8 * magnitude).all()  # a rounding a level of the tree
    ones = torch.full((8, 64), 257 / 256).to(torch.float32).to(BF16)
    _reduce_kernel[(1,)](ones, total, top, where, M=8, N=64)
    assert_same_bits(total, torch.full((8,), 64.0, dtype=BF16))


@triton.jit
def _softmax_pair(m1, s1, m2, s2):
    m = tl.maximum(m1, m2)
    return m, s1 * tl.exp(m1 - m) + s2 * tl.exp(m2 - m)


@triton.jit
def _pair_kernel(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    top, total = tl.reduce((x, tl.full([M, N], 1.0, tl.float32)), 1, _softmax_pair)
    tl.store(out_ptr + m, top + tl.log(total))


def test_reduction_with_a_function_of_its_own() -> None:
    x, out = torch.randn(8, 64), torch.empty(8)
    _pair_kernel[(1,)](x, out, M=8, N=64)
    torch.testing.assert_close(out, x.logsumexp(1))


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(out_ptr + i // 2, tl.load(x_ptr + tl.program_id(0) * N + i), mask=i < N - 2)


def test_bfloat16_atomics() -> None:
    x, out = torch.randn(3, 16).to(BF16), torch.zeros(8, dtype=BF16)
    _atomic_kernel[(3,)](x, out, N=16)
    expected = torch.zeros(8, dtype=BF16)
    for row in x:
        for i, value in enumerate(row[:14]):
            expected[i // 2] += value
    assert_same_bits(out, expected)


@triton.jit
def _undefined_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < 3))
    tl.store(out_ptr + N + i, tl.load(x_ptr + i, mask=i < 3, other=7.0))


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_lanes_masked_off_hold_garbage(dtype: torch.dtype) -> None:
    x, out = torch.ones(3, dtype=dtype), torch.empty(16, dtype=dtype)
    _undefined_kernel[(1,)](x, out, N=8)
    assert out[3:8].isnan().all()
    assert out[8:].tolist() == [1.0] * 3 + [7.0] * 5


# -- what a GPU would not forgive ------------------------------------------------------------------------------


@triton.jit
def _tf32_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.dot(x, x))


def test_a_float32_dot_without_ieee_is_refused() -> None:
    with pytest.raises(ValueError, match="ieee"):
        _tf32_kernel[(1,)](torch.ones(16, 16), torch.empty(16, 16), N=16)
    _tf32_kernel[(1,)](torch.ones(16, 16, dtype=BF16), torch.empty(16, 16), N=16)


def test_a_dot_too_small_for_a_tensor_core_is_refused() -> None:
    with pytest.raises(AssertionError, match="K >= 16"):
        _tf32_kernel[(1,)](torch.ones(8, 8, dtype=BF16), torch.empty(8, 8), N=8)


@triton.jit
def _assert_kernel(x_ptr):
    tl.device_assert(tl.load(x_ptr) == 1, "x must be one")


def test_device_assert_raises() -> None:
    _assert_kernel[(1,)](torch.ones(1))
    with pytest.raises(AssertionError, match="x must be one"):
        _assert_kernel[(1,)](torch.zeros(1))


def test_a_misspelt_keyword_is_an_error() -> None:
    with pytest.raises(TypeError, match="num_warp"):
        _assert_kernel[(1,)](torch.ones(1), num_warp=4)


@triton.jit
def _gather_kernel(
    cache_ptr,
    table_ptr,
    out_ptr,
    length,
    stride_out,
    SIZE: tl.constexpr,
    TABLE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Copy one stream's slots [length] out of blocks of SIZE; program i copies block i."""
    i = tl.program_id(0)
    offsets = tl.arange(0, SIZE)
    block = tl.load(table_ptr + i) if TABLE else i
    values = tl.load(cache_ptr + block * SIZE + offsets)
    index = i * SIZE + offsets
    if MASKED:
        tl.store(out_ptr + index * stride_out, values, mask=index < length)
    else:
        tl.store(out_ptr + index * stride_out, values)


def gather(
    blocks: list[int],
    num_programs: int | None = None,
    *,
    length: int = 11,
    stride: int = 1,
    masked: bool = True,
) -> Tensor:
    slab = torch.arange(3 * 5 * 4, dtype=torch.float32).view(3, 5, 4)  # the cache is the middle one
    out = torch.zeros(11)
    table = torch.tensor(blocks, dtype=torch.int32)
    programs = len(blocks) if num_programs is None else num_programs
    _gather_kernel[(programs,)](slab[1], table, out, length, stride, SIZE=4, TABLE=True, MASKED=masked)
    return out - 20


def test_a_clean_gather_passes() -> None:
    assert gather([4, 0, 2]).tolist() == [16, 17, 18, 19, 0, 1, 2, 3, 8, 9, 10]


@pytest.mark.parametrize("block", [5, -1])
def test_a_block_past_the_cache_is_caught(block: int) -> None:
    """Inside the slab's memory, but another layer's."""
    with pytest.raises(OutOfBounds, match=r"_gather_kernel, program \(1, 0, 0\): load of cache_ptr\["):
        gather([4, block, 2])


def test_a_length_past_the_block_table_is_caught() -> None:
    with pytest.raises(OutOfBounds, match=r"table_ptr\[3\] is outside of it: shape \(3,\)"):
        gather([4, 0, 2], 4)


def test_an_output_stride_of_zero_is_caught() -> None:
    with pytest.raises(Race, match=r"stores two values to out_ptr\[0\]"):
        gather([4, 0, 2], stride=0)


def test_a_missing_store_mask_is_caught() -> None:
    with pytest.raises(OutOfBounds, match=r"store of out_ptr\[11\]"):
        gather([4, 0, 2], masked=False)


@triton.jit
def _rows_kernel(x_ptr, out_ptr, stride_x, N: tl.constexpr, WIDTH: tl.constexpr):
    m, n = tl.arange(0, N), tl.arange(0, WIDTH)
    tl.store(out_ptr + m[:, None] * WIDTH + n[None, :], tl.load(x_ptr + m[:, None] * stride_x + n[None, :]))


def test_the_gaps_of_a_view_are_out_of_bounds() -> None:
    x, out = torch.randn(4, 16), torch.empty(4, 8)
    _rows_kernel[(1,)](x[:, 4:12], out, 16, N=4, WIDTH=8)
    assert torch.equal(out, x[:, 4:12])
    with pytest.raises(OutOfBounds, match=r"x_ptr\[8\].*strides \(16, 1\)"):
        _rows_kernel[(1,)](x[:, 4:12], torch.empty(4, 16), 16, N=4, WIDTH=16)
    with pytest.raises(OutOfBounds, match="x_ptr"):
        _rows_kernel[(1,)](torch.empty(0, 8), out, 8, N=4, WIDTH=8)


@triton.jit
def _swap_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    pointers = tl.where(i % 2 == 0, x_ptr + i, y_ptr + i)
    tl.store(out_ptr + i, tl.load(pointers))


def test_a_load_from_two_tensors_at_once_is_refused() -> None:
    with pytest.raises(OutOfBounds):
        _swap_kernel[(1,)](torch.ones(8), torch.ones(8), torch.empty(8), N=8)


# -- races -----------------------------------------------------------------------------------------------------


@triton.jit
def _accumulate_kernel(x_ptr, out_ptr, ATOMIC: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + tl.program_id(0) * N + i)
    if ATOMIC:
        tl.atomic_add(out_ptr + i, x, sem="relaxed")
    else:
        tl.store(out_ptr + i, tl.load(out_ptr + i) + x)


def test_an_accumulation_without_atomics_is_caught(any_program_order: str | int) -> None:
    x = torch.randn(3, 8)
    out = torch.zeros(8)
    _accumulate_kernel[(3,)](x, out, ATOMIC=True, N=8)
    torch.testing.assert_close(out, x.sum(0))
    with pytest.raises(Race, match=r"out_ptr\[0\], which program"):
        _accumulate_kernel[(3,)](x, torch.zeros(8), ATOMIC=False, N=8)


@triton.jit
def _split_kernel(
    x_ptr,
    scratch_ptr,
    counter_ptr,
    out_ptr,
    SEM: tl.constexpr,
    BARRIER: tl.constexpr,
    COUNT: tl.constexpr,
    N: tl.constexpr,
):
    """Column sums of x [programs, N]: each program leaves its part in scratch, the last to arrive adds up."""
    split, num_splits = tl.program_id(0), tl.num_programs(0)
    i = tl.arange(0, N)
    tl.store(scratch_ptr + split * N + i, tl.load(x_ptr + split * N + i))
    if BARRIER:
        tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem=SEM)
    if (arrived == num_splits - 1) == COUNT:
        total = tl.zeros([N], tl.float32)
        for other in range(num_splits if COUNT else 1):
            total += tl.load(scratch_ptr + other * N + i)
        tl.store(out_ptr + i, total)
        tl.store(counter_ptr, 0)


def split(sem: str = "acq_rel", barrier: bool = True, count: bool = True) -> Tensor:
    x, out = torch.arange(32.0).view(4, 8), torch.full((8,), torch.nan)
    scratch, counter = torch.full((4, 8), torch.nan), torch.zeros(1, dtype=torch.int32)
    for _ in range(2):  # the counter is ready for the next launch
        _split_kernel[(4,)](x, scratch, counter, out, SEM=sem, BARRIER=barrier, COUNT=count, N=8)
        assert counter.item() == 0
    assert torch.equal(out, x.sum(0))
    return out


def test_a_split_reduction_by_the_last_to_arrive_passes(any_program_order: str | int) -> None:
    split()


@pytest.mark.parametrize("sem", ["relaxed", "acquire", "release"])
def test_a_split_reduction_without_ordering_is_caught(sem: str) -> None:
    with pytest.raises(
        Race, match=r"loads scratch_ptr\[\d+\], which program \(\d, 0, 0\) stored to, in no order"
    ):
        split(sem)


def test_a_split_reduction_without_a_barrier_is_caught() -> None:
    """Of all warps' stores, a release by the program's first thread covers what a barrier put before it."""
    with pytest.raises(Race, match="debug_barrier"):
        split(barrier=False)


def test_a_merge_before_the_last_arrived_is_caught() -> None:
    with pytest.raises(Race, match="in no order"), program_order("descending"):
        split(count=False)


@triton.jit
def _reread_kernel(x_ptr, BARRIER: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x_ptr + i, i.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + i, tl.load(x_ptr + N - 1 - i))


def test_reading_back_without_a_barrier_is_caught() -> None:
    x = torch.empty(8)
    _reread_kernel[(1,)](x, BARRIER=True, N=8)
    assert x.tolist() == list(range(7, -1, -1))
    with pytest.raises(Race, match="stored itself"):
        _reread_kernel[(1,)](x, BARRIER=False, N=8)


@triton.jit
def _mixed_kernel(out_ptr):
    if tl.program_id(0) == 0:
        tl.store(out_ptr, 0.0)  # meant to run first, but who says so
    tl.atomic_add(out_ptr, 1.0)


def test_zeroing_beside_atomics_is_caught(any_program_order: str | int) -> None:
    with pytest.raises(Race):
        _mixed_kernel[(3,)](torch.zeros(1))


# -- inputs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True])
def test_ragged_batches_are_what_the_reference_takes(int8: bool) -> None:
    from guardengine.kernels import reference

    for lengths, wanted in shapes(block_size=4, segment=8):
        batch = ragged_batch(lengths, wanted, int8=int8, dtype=torch.float32)
        out = reference.paged_attention(*batch.arguments(32**-0.5))
        assert out.isfinite().all()
        if not wanted[0]:
            continue
        position, k, v = wanted[0][0], batch.keys[0].double(), batch.values[0].double()
        k, v = (part[: position + 1].repeat_interleave(2, dim=1) for part in (k, v))
        weights = (torch.einsum("hd,nhd->hn", batch.q[0].double(), k) * 32**-0.5).softmax(-1)
        exact = torch.einsum("hn,nhd->hd", weights, v)
        torch.testing.assert_close(out[0].double(), exact, rtol=0, atol=0.02 if int8 else 1e-5)
