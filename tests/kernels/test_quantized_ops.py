"""`quantize` and `linear` over int8 weights, in both backends, for every instruction set of this machine.

Both round to the same integers, so what is exact is known: the same integers multiplied in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from native_ops import assert_close_as_torch, rand
from pairwise import grid
from torch import Tensor

from guardengine.kernels import cpu, native, reference
from guardengine.kernels.quantization import GROUP_SIZE, SCHEMES, quantize_rows, quantize_weight

DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = (cpu, reference)
SIZES = [(1, 2), (11, 32), (32, 64), (33, 7), (31, 127), (65, 129), (96, 130), (129, 1024), (64, 3070)]


@pytest.fixture(params=native.usable_isas(), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GUARDENGINE_ISA", request.param)
    return request.param


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def both(x: Tensor, weight: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    """linear of the native backend, of plain PyTorch, and exactly, all of the same integers."""
    results = [ops.linear(x, ops.quantize(weight, scheme)) for ops in BACKENDS]
    quantized = quantize_weight(weight, scheme)
    scales = quantized.scales.double()
    if quantized.rounds_rows:
        rows, row_scales = quantize_rows(x)
        sums = rows.double() @ quantized.values.double().T  # whole numbers, before anything rounds
        exact = sums * scales[:, 0] * row_scales.double()[:, None]
    else:
        scales = scales.repeat_interleave(quantized.group_size, dim=1)[:, : weight.shape[1]]
        exact = x.double() @ (quantized.values.double() * scales).T
    return results[0], results[1], exact


def assert_exact_sums(actual: Tensor, exact: Tensor) -> None:
    """w8a8: every value by itself is right to a few roundings in float32 and the one at the output."""
    few = 4 * torch.finfo(torch.float32).eps
    allowed = exact.abs() * (few if actual.dtype == torch.float32 else few + 2.0**-8)
    error = (actual.double() - exact).abs() - allowed
    assert error.max() <= torch.finfo(torch.float32).tiny, f"{error.argmax()} of {list(actual.shape)}"


def assert_right(actual: Tensor, plain: Tensor, exact: Tensor, scheme: str) -> None:
    assert actual.isfinite().all()
    assert_close_as_torch(actual, plain, exact)
    if scheme == "w8a8":
        assert_exact_sums(actual, exact)
        assert_exact_sums(plain, exact)


# -- the numbers -----------------------------------------------------------------------------------------------


# Pairs of size, scheme and dtype, for every instruction set.
@grid(size=SIZES, scheme=SCHEMES, dtype=DTYPES)
def test_linear(size: tuple[int, int], scheme: str, dtype: torch.dtype) -> None:
    out, inner = size
    weight = rand(out, inner, dtype=dtype, scale=inner**-0.5)
    for num_rows in (1, 5, 13, 70):
        x = rand(num_rows, inner, dtype=dtype)
        assert_right(*both(x, weight, scheme), scheme)


# Pairs of number, scheme and dtype, for every instruction set: around each number that a kernel takes at a time.
@grid(
    num_rows=[*range(2, 13), 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65],
    scheme=SCHEMES,
    dtype=DTYPES,
)
def test_linear_of_any_number_of_rows(num_rows: int, scheme: str, dtype: torch.dtype) -> None:
    x, weight = rand(num_rows, 390, dtype=dtype, seed=1), rand(75, 390, dtype=dtype, scale=0.05)
    assert_right(*both(x, weight, scheme), scheme)


def test_no_rows(scheme: str, dtype: torch.dtype) -> None:
    weight = rand(5, 36, dtype=dtype)
    for ops in BACKENDS:
        out = ops.linear(torch.empty(0, 36, dtype=dtype), ops.quantize(weight, scheme))
        assert out.shape == (0, 5)
        assert out.dtype == dtype


def test_integers_and_scales_are_the_references(scheme: str) -> None:
    """Rows of the unit matrix read a weight matrix out, one value at a time."""
    weight = rand(70, 300, scale=0.1)
    weight[3] = weight[3].abs() * 1e4  # rows and groups of other magnitudes
    weight[4, 130:] *= 1e-4
    weight[5, 7] = 3e3
    weight[6] = 0
    weight[7, :GROUP_SIZE] = 0
    expected = quantize_weight(weight, scheme)
    found = cpu.linear(torch.eye(300), cpu.quantize(weight, scheme)).T
    scales = expected.scales.repeat_interleave(expected.group_size, dim=1)[:, :300]
    integers = (found.double() / scales.double().clamp_min(1e-30)).round()
    assert torch.equal(integers, expected.values.double())
    torch.testing.assert_close(found, expected.dequantized(), rtol=3e-7, atol=0)


# Pairs of length, scheme and dtype, for every instruction set.
@grid(num_values=[7, 64, 390], scheme=SCHEMES, dtype=DTYPES)
def test_values_of_few_bits_are_rounded_to_the_references_integers(num_values, scheme, dtype) -> None:
    """bf16 values over their row's maximum are often halfway, or a rounding away from it."""
    values = rand(400, num_values, dtype=torch.bfloat16)
    unit = torch.eye(num_values, dtype=dtype)
    expected = quantize_weight(values, scheme).dequantized()
    found = cpu._linear(unit, cpu.quantize(values.to(dtype), scheme), is_float_out=True)
    torch.testing.assert_close(found.T, expected, rtol=3e-7, atol=0)
    if scheme == "w8a8":
        rows, scales = quantize_rows(values)
        found = cpu._linear(values.to(dtype), cpu.quantize(unit, scheme), is_float_out=True)
        torch.testing.assert_close(found, rows * scales[:, None], rtol=3e-7, atol=0)


def test_ties_go_to_even_and_nothing_reaches_minus_128(scheme: str) -> None:
    halves = torch.arange(-254, 255) / 2  # -127.0, -126.5, ... 127.0 with a scale of one
    row = with_scales_of_one(halves)
    expected = row.round()
    assert expected[-2:].tolist() == [-2.0, 0.0]  # -1.5 and 0.5, the padding
    found = cpu.linear(torch.eye(len(row)), cpu.quantize(row[None], scheme))[:, 0]
    if scheme == "int8":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)
        rows = cpu.linear(row[None], cpu.quantize(torch.eye(len(row)), scheme))[
            0
        ]  # and the rows' own rounding
        torch.testing.assert_close(rows, expected, rtol=3e-7, atol=0)


def with_scales_of_one(halves: Tensor) -> Tensor:
    """Every group of GROUP_SIZE values gets a 127 of its own, so that each has a scale of one."""
    parts = [torch.cat((torch.tensor([127.0]), part)) for part in halves.split(GROUP_SIZE - 1)]
    return torch.cat((*parts, torch.tensor([-1.5, 0.5])))


# Pairs of length, scheme and dtype, for every instruction set; the patterns of signs are rows of each.
@grid(inner=[4, 50, 128, 1000, 65536], scheme=SCHEMES, dtype=DTYPES)
def test_sums_of_extremes_are_exact(inner: int, scheme: str, dtype: torch.dtype) -> None:
    """Products of +-127 by +-127 in every pattern of signs: a sum that saturates or wraps around shows."""
    signs = torch.ones(6, inner)
    signs[1] = -1
    signs[2, ::2] = -1
    signs[3, 1::2] = -1
    signs[4, : inner // 2] = -1
    signs[5, 1::4] = signs[5, 2::4] = -1
    x, weight = (signs * 127).to(dtype), (signs.repeat(6, 1)[:33] * 127).to(dtype)
    actual, _, exact = both(x, weight, scheme)
    if dtype == torch.float32 and inner <= 1000:
        assert torch.equal(actual.double(), exact)
    assert_exact_sums(actual, exact)


def test_rows_with_one_huge_value(scheme: str, dtype: torch.dtype) -> None:
    x, weight = rand(9, 260, dtype=dtype), rand(40, 260, dtype=dtype, scale=0.1)
    for row in range(1, 9):
        x[row, row * 31] = 10.0 ** (row - 2) * (-1) ** row
    weight[3, 77], weight[4, 200] = 1e3, -1e5
    actual, plain, exact = both(x, weight, scheme)
    for row in range(9):  # each by its own magnitude
        assert_right(actual[row], plain[row], exact[row], scheme)


def test_rows_of_zeros(scheme: str, dtype: torch.dtype) -> None:
    x, weight = rand(5, 130, dtype=dtype), rand(35, 130, dtype=dtype)
    x[1], x[3], weight[0], weight[34] = 0, -0.0, 0, -0.0
    actual, plain, exact = both(x, weight, scheme)
    assert_right(actual, plain, exact, scheme)
    assert (actual[[1, 3]] == 0).all()
    assert (actual[:, [0, 34]] == 0).all()


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-37, 0.99e-35, 1.5e-35, 1e-33, 1e-30])
def test_rows_next_to_nothing(magnitude: float, scheme: str) -> None:
    """Down to denormals: small values or zeros, never an infinite inverse."""
    x, weight = rand(40, 136), rand(35, 136)
    x[2] = x[2] / x[2].abs().max() * magnitude
    assert_right(*both(x, weight, scheme), scheme)
    weight[5] = weight[5] / weight[5].abs().max() * magnitude
    weight[6, :GROUP_SIZE] *= magnitude
    actual, plain, exact = both(x, weight, scheme)
    assert actual.isfinite().all()
    kept = [row for row in range(40) if row != 2]  # not what is next to nothing twice
    assert_right(actual[kept], plain[kept], exact[kept], scheme)
    for out in (5, 6):
        assert_right(actual[kept, out], plain[kept, out], exact[kept, out], scheme)


def test_rows_of_another_dtype_than_the_weight_are_refused(scheme: str) -> None:
    """Layouts differ between dtypes: read as another one, a weight would be nonsense."""
    packed = cpu.quantize(rand(40, 132), scheme)
    with pytest.raises(ValueError, match=r"rows of torch.bfloat16, weight packed from torch.float32"):
        cpu.linear(rand(6, 132, dtype=torch.bfloat16), packed)


# -- broken numbers --------------------------------------------------------------------------------------------

BROKEN = [math.nan, math.inf, -math.inf]


# Triples of place, value, scheme and dtype, for every instruction set: the ends of a row, of a group and of what a
# kernel takes at a time.
@grid(3, place=[0, 1, 64, 127, 128, 257], value=BROKEN, scheme=SCHEMES, dtype=DTYPES)
def test_broken_rows_reach_the_output(place: int, value: float, scheme: str, dtype: torch.dtype) -> None:
    """Alone in their row, whatever else is computed; w8a8 cannot say which way an infinity went: NaN."""
    x, weight = rand(14, 258, dtype=dtype), rand(67, 258, dtype=dtype)
    weight[9], weight[:, place] = 0, 0  # nothing may hide behind a product with zero
    broken = x.clone()
    broken[4, place] = value
    for ops in BACKENDS:
        packed = ops.quantize(weight, scheme)
        whole, healthy = ops.linear(broken, packed), ops.linear(x, packed)
        assert not whole[4].isfinite().any(), ops.__name__
        if math.isnan(value) or scheme == "w8a8":
            assert whole[4].isnan().all(), ops.__name__
        others = [row for row in range(14) if row != 4]
        assert torch.equal(whole[others], healthy[others])
        assert not ops.linear(broken[4:5], packed).isfinite().any()


# Triples of place, value, scheme and dtype, for every instruction set.
@grid(3, place=[0, 127, 128, 257], value=BROKEN, scheme=SCHEMES, dtype=DTYPES)
def test_broken_weights_reach_the_output(place: int, value: float, scheme: str, dtype: torch.dtype) -> None:
    """Every output of that row of weights, even where what it is multiplied with is zero."""
    x, weight = rand(14, 258, dtype=dtype), rand(67, 258, dtype=dtype)
    x[3], x[:, place] = 0, 0
    broken = weight.clone()
    broken[[0, 40, 66], place] = value
    others = [out for out in range(67) if out not in (0, 40, 66)]
    for ops in BACKENDS:
        whole, healthy = (ops.linear(x, ops.quantize(w, scheme)) for w in (broken, weight))
        assert whole[:, [0, 40, 66]].isnan().all(), ops.__name__
        assert torch.equal(whole[:, others], healthy[:, others])


def test_a_result_too_large_for_the_dtype_is_not_finite(scheme: str, dtype: torch.dtype) -> None:
    x, weight = torch.full((3, 64), 3e38).to(dtype), torch.full((33, 64), 10.0).to(dtype)
    for ops in BACKENDS:
        assert not ops.linear(x, ops.quantize(weight, scheme)).isfinite().any()


# -- the same bits ---------------------------------------------------------------------------------------------


# Pairs of size, scheme and dtype, for every instruction set.
@grid(size=[(96, 66), (33, 1030), (40, 16384)], scheme=SCHEMES, dtype=DTYPES)
def test_rows_do_not_depend_on_their_number(size: tuple[int, int], scheme: str, dtype: torch.dtype) -> None:
    out, inner = size
    x, weight = rand(70, inner, dtype=dtype), rand(out, inner, dtype=dtype)
    packed = cpu.quantize(weight, scheme)
    whole = cpu.linear(x, packed)
    for num_rows in range(1, 70) if inner < 2000 else (1, 2, 3, 5, 8, 13, 23, 64):
        assert torch.equal(cpu.linear(x[:num_rows], packed), whole[:num_rows]), num_rows
        assert torch.equal(cpu.linear(x[-num_rows:], packed), whole[-num_rows:]), num_rows


def test_rows_do_not_depend_on_their_neighbours(scheme: str, dtype: torch.dtype) -> None:
    x, weight = rand(23, 300, dtype=dtype), rand(50, 300, dtype=dtype)
    packed = cpu.quantize(weight, scheme)
    whole = cpu.linear(x, packed)
    for row in range(23):
        for other in (math.nan, 0.0, 3e30):
            among = torch.full_like(x, other)
            among[row] = x[row]
            assert torch.equal(cpu.linear(among, packed)[row], whole[row]), (row, other)


@pytest.mark.usefixtures("num_threads")
def test_the_number_of_threads_does_not_matter(scheme: str, dtype: torch.dtype) -> None:
    x, weight = rand(30, 200, dtype=dtype), rand(500, 200, dtype=dtype)
    expected = cpu.linear(x, cpu.quantize(weight, scheme))
    for threads in range(2, 9):
        torch.set_num_threads(threads)
        assert torch.equal(cpu.linear(x, cpu.quantize(weight, scheme)), expected)


@pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: ops.__name__)
def test_an_unknown_scheme_is_refused(ops) -> None:
    with pytest.raises(ValueError, match="scheme='int3': choose one of int8, w8a8"):
        ops.quantize(torch.ones(4, 4), "int3")
