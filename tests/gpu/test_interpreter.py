"""The patched interpreter itself: bfloat16 as torch computes it, and what a GPU would not forgive is refused."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

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
