"""The native operators against the reference, for every instruction set of this machine.

Closeness: at most twice the error of plain PyTorch at the same dtype. Independence of neighbours: the same bits.
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

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=native.usable_isas(), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GUARDENGINE_ISA", request.param)
    return request.param


@pytest.fixture
def num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# -- linear ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("out", "inner"), [(1, 2), (11, 32), (32, 64), (33, 7), (96, 50), (129, 1024), (64, 3072)]
)
def test_linear(out: int, inner: int, dtype: torch.dtype) -> None:
    weight = rand(out, inner, dtype=dtype, scale=inner**-0.5)
    for num_rows in (1, 5, 13):
        x = rand(num_rows, inner, dtype=dtype)
        exact = x.double() @ weight.double().T
        assert_close_as_torch(cpu.linear(x, weight), reference.linear(x, weight), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "inner"), [(96, 66), (40, 16384)])  # the second one in blocks of rows
def test_linear_rows_do_not_depend_on_their_number(out: int, inner: int, dtype: torch.dtype) -> None:
    x, weight = rand(70, inner, dtype=dtype), rand(out, inner, dtype=dtype)
    packed = native.Packed(cpu._workers(), weight)
    whole = cpu.linear(x, packed)
    for num_rows in range(1, 70):
        assert torch.equal(cpu.linear(x[:num_rows], packed), whole[:num_rows]), num_rows
    for row in (0, 31, 69):
        assert torch.equal(cpu.linear(x[row : row + 1], packed), whole[row : row + 1])


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_does_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    x, weight = rand(30, 64, dtype=dtype), rand(500, 64, dtype=dtype)
    expected = cpu.linear(x, weight)
    for threads in range(2, 9):
        torch.set_num_threads(threads)
        assert torch.equal(cpu.linear(x, weight), expected)


def test_linear_is_exact_on_whole_numbers(isa: str) -> None:
    """Sums of small integers have one right answer in any order: a lost or doubled product shows."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, (17, 90), generator=generator)
    weight = torch.randint(-3, 4, (75, 90), generator=generator)
    for dtype in DTYPES:
        actual = cpu._linear(x.to(dtype), weight.to(dtype), is_float_out=True)
        assert torch.equal(actual, (x @ weight.T).float())


# -- rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 100), (3, 5, 128), (70, 33)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = rand(*shape, dtype=dtype, scale=3), 1 + rand(shape[-1], dtype=dtype, scale=0.1)
    x64 = x.double()
    exact = x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    actual = cpu.rms_norm(x, weight, 1e-6)
    assert_close_as_torch(actual, reference.rms_norm(x, weight, 1e-6), exact)
    assert torch.equal(cpu.rms_norm(x[:1], weight, 1e-6), actual[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual, weight = rand(5, 64, dtype=dtype), rand(5, 64, dtype=dtype, seed=1), rand(64, dtype=dtype)
    normed, total = cpu.fused_add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, cpu.rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.01, 4, 60])
def test_silu_and_mul(dtype: torch.dtype, scale: float) -> None:
    gate_up = rand(6, 2 * 48, dtype=dtype, scale=scale)
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate) * up
    assert_close_as_torch(cpu.silu_and_mul(gate_up), reference.silu_and_mul(gate_up), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_of_extremes(dtype: torch.dtype) -> None:
    gate = torch.tensor([0.0, -0.0, 200.0, -200.0, 3e38, -3e38, math.inf, math.nan, 88.0, -88.0, -100.0])
    gate_up = torch.cat((gate, torch.ones(11)))[None].to(dtype)
    actual, expected = cpu.silu_and_mul(gate_up), reference.silu_and_mul(gate_up)
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_bf16_rounding_is_torchs() -> None:
    """Ties, overflow, denormals, infinities and NaN, through an operator that only rounds."""
    bits = torch.arange(-(2**31), 2**31, 99_991, dtype=torch.int64).to(torch.int32)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00018000, 0x7FFFFFFF, 0x7F800001])
    values = torch.cat((bits, ties.to(torch.int32))).view(torch.float32)
    cache = torch.zeros(2, 1, len(values) // 32, 1, 32, dtype=torch.bfloat16)
    values = values[: cache[0].numel()]
    qkv = torch.cat((torch.ones(cache.shape[2], 64), values.view(-1, 32)), dim=1)
    cpu.qk_norm_rope_store_kv(
        qkv,
        torch.ones(32),
        torch.ones(32),
        reference.rope_table(32, 1e6, 1),
        torch.zeros(len(qkv), dtype=torch.int64),
        torch.arange(len(qkv)),
        cache[0],
        cache[1],
        1e-6,
    )
    expected = values.to(torch.bfloat16)
    assert torch.equal(cache[1].flatten().isnan(), expected.isnan())
    assert torch.equal(cache[1].flatten().nan_to_num(7), expected.nan_to_num(7))


# -- keys and values -------------------------------------------------------------------------------------------


# Pairs of shape and dtypes, for every instruction set.
@grid(shape=[(4, 2, 32), (8, 1, 64), (3, 3, 128)], dtype=DTYPES, kv_dtype=DTYPES)
def test_qk_norm_rope_store_kv(
    shape: tuple[int, int, int], dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads, head_dim = shape
    num_rows = 5
    qkv = rand(num_rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    q_norm = 1 + rand(head_dim, dtype=dtype, scale=0.1)
    k_norm = 1 + rand(head_dim, dtype=dtype, seed=9, scale=0.1)
    table = reference.rope_table(head_dim, 1e6, 16)
    positions, slots = torch.tensor([0, 9, 3, 15, 4]), torch.tensor([10, 1, 7, 0, 11])
    caches = [torch.full((2, 3, 4, num_kv_heads, head_dim), torch.nan, dtype=kv_dtype) for _ in range(2)]
    outputs = [
        ops.qk_norm_rope_store_kv(qkv, q_norm, k_norm, table, positions, slots, *cache, 1e-6)
        for ops, cache in zip((cpu, reference), caches, strict=True)
    ]
    x64 = qkv.double().view(num_rows, -1, head_dim)

    def exact(heads: Tensor, norm: Tensor) -> Tensor:
        normed = heads / (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
        return reference.apply_rope(normed, table[positions].double())

    assert_close_as_torch(*outputs, exact(x64[:, :num_heads], q_norm))
    actual, plain = (cache.flatten(1, 2) for cache in caches)
    keys = exact(x64[:, num_heads : num_heads + num_kv_heads], k_norm)
    assert_close_as_torch(actual[0, slots], plain[0, slots], keys)
    assert torch.equal(actual[1, slots], plain[1, slots])
    assert torch.equal(actual.isnan(), plain.isnan())  # no other slot was touched


# -- attention -------------------------------------------------------------------------------------------------


def paged(lengths: list[int], block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype):
    """Keys and values of streams of these lengths, dense and scattered over a cache poisoned with NaN."""
    shape = (num_kv_heads, head_dim)
    dense = [
        (rand(n, *shape, dtype=dtype, seed=i), rand(n, *shape, dtype=dtype, seed=-i - 1))
        for i, n in enumerate(lengths)
    ]
    counts = [-(-n // block_size) for n in lengths]
    shuffled = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(1)).tolist()
    cache = torch.full((2, len(shuffled), block_size, num_kv_heads, head_dim), torch.nan, dtype=dtype)
    tables = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
    for row, (keys, values) in enumerate(dense):
        for index in range(counts[row]):
            block = shuffled.pop()
            tables[row, index] = block
            part = slice(index * block_size, (index + 1) * block_size)
            cache[0, block, : len(keys[part])] = keys[part]
            cache[1, block, : len(values[part])] = values[part]
    return dense, cache[0], cache[1], tables


def dense_attention(q: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
    """One row by the formula, in the dtype given.  Shapes: q [H, D]; keys, values [n, Hkv, D]."""
    group = q.shape[0] // keys.shape[1]
    k = keys[: position + 1].repeat_interleave(group, dim=1)
    v = values[: position + 1].repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,nhd->hn", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), v)


BATCHES: list[tuple[list[int], list[list[int]]]] = [
    ([1], [[0]]),
    ([5], [[0, 1, 2, 3, 4]]),
    ([63, 64, 65], [[62], [63], [64]]),  # around a tile of keys
    ([140, 1, 2, 9], [list(range(60, 140)), [0], [0, 1], [8]]),  # one long among short ones
    ([12, 6, 9], [[], [5], []]),  # streams without rows
    ([170, 11], [[2, 7, 16, 66, 169], [0, 10]]),  # rows picked here and there
]


# Pairs of batch, shape and dtype, for every instruction set.
@grid(batch=BATCHES, shape=[(4, 2, 32, 4), (8, 1, 96, 3), (2, 2, 128, 16)], dtype=DTYPES)
def test_paged_attention(batch, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    (lengths, rows), (num_heads, num_kv_heads, head_dim, block_size) = batch, shape
    dense, k_cache, v_cache, tables = paged(lengths, block_size, num_kv_heads, head_dim, dtype)
    positions = torch.tensor([p for row in rows for p in row])
    cu_seqlens = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0)], dtype=torch.int32)
    q = rand(len(positions), num_heads, head_dim, dtype=dtype, seed=5)
    out = cpu.paged_attention(q, k_cache, v_cache, tables, cu_seqlens, positions, head_dim**-0.5)

    pairs = [(dense[i], p) for i, row in enumerate(rows) for p in row]
    plain = torch.stack([dense_attention(q[t], k, v, p) for t, ((k, v), p) in enumerate(pairs)])
    exact = torch.stack(
        [dense_attention(q[t].double(), k.double(), v.double(), p) for t, ((k, v), p) in enumerate(pairs)]
    )
    assert_close_as_torch(out, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [2, 6, 80])  # one, several, and too many query heads a tile of rows
def test_attention_rows_do_not_depend_on_their_neighbours(num_heads: int, dtype: torch.dtype) -> None:
    num_kv_heads, head_dim, length = 2, 64, 150
    _, k_cache, v_cache, tables = paged([length], 5, num_kv_heads, head_dim, dtype)
    q, positions = rand(length, num_heads, head_dim, dtype=dtype), torch.arange(length)

    def attend(rows: Tensor) -> Tensor:
        bounds = torch.tensor([0, len(rows)])
        return cpu.paged_attention(q[rows], k_cache, v_cache, tables, bounds, positions[rows], 0.125)

    whole = attend(torch.arange(length))
    assert whole.isfinite().all()
    for chunk in (1, 4, 7, 16, 33):
        parts = [attend(rows) for rows in torch.arange(length).split(chunk)]
        assert torch.equal(torch.cat(parts), whole), chunk
    scattered = torch.tensor([0, 3, 63, 64, 70, 127, 128, 149])
    assert torch.equal(attend(scattered), whole[scattered])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_never_reads_later_keys(dtype: torch.dtype) -> None:
    """Later slots may hold what other rows of the same call just stored: even NaN there changes nothing."""
    _, k_cache, v_cache, tables = paged([70], 4, 1, 32, dtype)
    q, positions = rand(2, 2, 32, dtype=dtype), torch.tensor([40, 69])
    bounds = torch.tensor([0, 2])
    before = cpu.paged_attention(q, k_cache, v_cache, tables, bounds, positions, 0.2)
    for cache in (k_cache, v_cache):
        cache[tables[0, 11:]] = torch.nan  # positions from 44 on
    after = cpu.paged_attention(q, k_cache, v_cache, tables, bounds, positions, 0.2)
    assert torch.equal(after[0], before[0])
    assert after[1].isnan().all()


def test_attention_to_one_huge_score() -> None:
    """Scores far apart, in both orders: the maximum moves, or makes everything else vanish."""
    keys, values = rand(130, 1, 32), rand(130, 1, 32, seed=1)
    q = rand(1, 1, 32)
    for place in (0, 70, 129):
        k_cache = keys.clone()
        k_cache[place] = q[0] * 100
        out = cpu.paged_attention(
            q, k_cache[:, None], values[:, None], torch.arange(130)[None], torch.tensor([0, 1]),
            torch.tensor([129]), 1.0,
        )  # fmt: skip
        torch.testing.assert_close(out, values[None, place], rtol=1e-5, atol=1e-5)


# -- heads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_guard_heads(dtype: torch.dtype) -> None:
    hidden, inner = 64, 32
    x = rand(5, hidden, dtype=dtype)
    final_norm = 1 + rand(hidden, dtype=dtype, scale=0.1)
    inner_norm = 1 + rand(2, inner, dtype=dtype, scale=0.1)
    pre = rand(2 * inner, hidden, dtype=dtype, scale=0.2)
    heads = rand(11, inner, dtype=dtype), rand(12, inner, dtype=dtype)
    arguments = (x, final_norm, pre, inner_norm, *heads)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    x64, final64, pre64, inner64, *heads64 = (tensor.double() for tensor in arguments)
    sides = (norm(x64, final64) @ pre64.T).chunk(2, dim=-1)
    exact = torch.cat([norm(s, n) @ h.T for s, n, h in zip(sides, inner64, heads64, strict=True)], dim=-1)
    assert_close_as_torch(cpu.guard_heads(*arguments, 1e-6), reference.guard_heads(*arguments, 1e-6), exact)


def test_head_dim_that_is_no_multiple_of_32_is_refused() -> None:
    cache = torch.zeros(1, 4, 1, 48)
    with pytest.raises(ValueError, match="head_dim=48"):
        cpu.paged_attention(
            torch.zeros(1, 1, 48),
            cache,
            cache,
            torch.zeros(1, 1),
            torch.tensor([0, 1]),
            torch.tensor([0]),
            1.0,
        )
