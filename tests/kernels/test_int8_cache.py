"""int8 KV caches at the operators: what is stored, and attention over it, for every instruction set of this machine.

The same integers and scales in float64 say what is exact. Slots that nobody may read hold NaN scales.
"""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from native_ops import assert_close_as_torch, rand
from pairwise import grid
from torch import Tensor

from guardengine.kernels import cpu, native, reference
from guardengine.kernels.quantization import quantize_rows

DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = (cpu, reference)


@pytest.fixture(params=native.usable_isas(), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GUARDENGINE_ISA", request.param)
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


class Cache:
    """Keys and values of `num_blocks` blocks in int8, every slot poisoned: extreme integers, NaN scales."""

    def __init__(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> None:
        self.values = torch.full((2, num_blocks, block_size, num_kv_heads, head_dim), -128, dtype=torch.int8)
        self.scales = torch.full((2, num_blocks, num_kv_heads, block_size), torch.nan)

    def arguments(self) -> tuple[Tensor, ...]:
        return self.values[0], self.values[1], self.scales[0], self.scales[1]

    def copy(self) -> Cache:
        other = Cache(*self.values.shape[1:])
        other.values.copy_(self.values)
        other.scales.copy_(self.scales)
        return other

    def slots(self, which: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """(integers [T, Hkv, D], scales [T, Hkv]) of some slots' keys (0) or values (1)."""
        return (
            self.values[which].flatten(0, 1)[slots],
            self.scales[which].transpose(1, 2).flatten(0, 1)[slots],
        )


# -- storing ---------------------------------------------------------------------------------------------------

SHAPES = [(4, 2, 32), (8, 1, 64), (3, 3, 128), (6, 2, 96)]  # query heads, key heads, head_dim


def store(ops: ModuleType, qkv: Tensor, norms: tuple[Tensor, Tensor], slots: Tensor, shape, block_size=5):
    """(q, cache) after storing rows at positions 7, 8, ..."""
    num_rows, (_, num_kv_heads, head_dim) = len(qkv), shape
    cache = Cache(4 + num_rows // block_size * 2, block_size, num_kv_heads, head_dim)
    k_cache, v_cache, k_scales, v_scales = cache.arguments()
    table, positions = reference.rope_table(head_dim, 1e6, 7 + num_rows), torch.arange(7, 7 + num_rows)
    q = ops.qk_norm_rope_store_kv(
        qkv, *norms, table, positions, slots, k_cache, v_cache, 1e-6, k_scales, v_scales
    )
    return q, cache


def rows_for(shape: tuple[int, int, int], num_rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    num_heads, num_kv_heads, head_dim = shape
    qkv = rand(num_rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    norms = [1 + rand(head_dim, dtype=dtype, seed=seed, scale=0.1) for seed in (0, 9)]
    slots = torch.randperm(num_rows + 10, generator=torch.Generator().manual_seed(3))[:num_rows]
    return qkv, tuple(norms), slots


# Pairs of number, shape and dtype, for every instruction set.
@grid(num_rows=[1, 5, 70], shape=SHAPES, dtype=DTYPES)
def test_stored_integers_and_scales(num_rows: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_dim = shape
    qkv, norms, slots = rows_for(shape, num_rows, dtype)
    (q, ours), (plain_q, plain) = (store(ops, qkv, norms, slots, shape) for ops in BACKENDS)

    heads = qkv.double().view(num_rows, -1, head_dim)
    table = reference.rope_table(head_dim, 1e6, 7 + num_rows)[7:].double()

    def exact(part: Tensor, norm: Tensor) -> Tensor:
        normed = part / (part.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
        return reference.apply_rope(normed, table)

    assert_close_as_torch(q, plain_q, exact(heads[:, :num_heads], norms[0]))
    keys = exact(heads[:, num_heads:-num_kv_heads], norms[1])
    integers, scales = ours.slots(0, slots)
    top = keys.abs().amax(-1)
    assert_close_as_torch(scales, plain.slots(0, slots)[1], top / 127)
    # To the nearest integer, up to what float32 loses before: a few 1e-7 of 127.
    distance = (integers.double() - keys * (127 / top)[..., None]).abs()
    assert distance.max() <= 0.5 + 1e-3
    assert (integers != plain.slots(0, slots)[0]).double().mean() <= 1e-3

    integers, scales = ours.slots(1, slots)  # values are rounded as they are: nothing to differ in
    expected = quantize_rows(qkv.view(num_rows, -1, head_dim)[:, -num_kv_heads:])
    assert torch.equal(integers, expected[0])
    torch.testing.assert_close(scales, expected[1], rtol=2.4e-7, atol=0)
    assert integers.abs().amax(-1).eq(127).all()


def test_no_other_slot_is_touched(dtype: torch.dtype) -> None:
    shape = SHAPES[0]
    qkv, norms, slots = rows_for(shape, 9, dtype)
    for ops in BACKENDS:
        _, cache = store(ops, qkv, norms, slots, shape)
        others = torch.tensor(
            [s for s in range(cache.values[0, :, :, 0, 0].numel()) if s not in slots.tolist()]
        )
        for which in (0, 1):
            integers, scales = cache.slots(which, others)
            assert (integers == -128).all()
            assert scales.isnan().all()
            assert cache.slots(which, slots)[1].isfinite().all()


def test_rows_are_stored_alike_alone_and_together(dtype: torch.dtype) -> None:
    shape = (4, 2, 32)
    qkv, norms, slots = rows_for(shape, 1, dtype)
    _, alone = store(cpu, qkv, norms, slots, shape)
    others = rand(30, qkv.shape[1], dtype=dtype, seed=4) * 100
    crowd, places = torch.cat((qkv, others)), torch.cat((slots, 11 + torch.arange(30)))
    _, together = store(cpu, crowd, norms, places, shape)
    for which in (0, 1):
        for found, expected in zip(together.slots(which, slots), alone.slots(which, slots), strict=True):
            assert torch.equal(found, expected)


# Pairs of place, value and dtype, for every instruction set.
@grid(place=[0, 17, 31], value=[math.nan, math.inf, -math.inf], dtype=DTYPES)
def test_broken_numbers_are_stored_as_broken_scales(place: int, value: float, dtype: torch.dtype) -> None:
    """In the heads they are in, and in no other."""
    shape = (4, 2, 32)
    qkv, norms, slots = rows_for(shape, 5, dtype)
    heads = qkv.view(5, -1, 32)
    heads[1, 5, place], heads[3, 6, place] = value, value  # second key head, first value head
    heads[4, 7] = 0  # second value head
    for ops in BACKENDS:
        _, cache = store(ops, qkv, norms, slots, shape)
        broken = [cache.slots(which, slots)[1].isnan().nonzero().tolist() for which in (0, 1)]
        assert broken == [[[1, 1]], [[3, 0]]], ops.__name__
        integers, scales = (part[4, 1] for part in cache.slots(1, slots))
        assert (integers == 0).all()
        assert scales == 0


# -- attention -------------------------------------------------------------------------------------------------


def paged(
    lengths: list[int], block_size: int, num_kv_heads: int, head_dim: int
) -> tuple[Cache, Tensor, list]:
    """(cache, block tables, each stream's keys and values in float64) of streams of these lengths."""
    counts = [-(-n // block_size) for n in lengths]
    blocks = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(1)).tolist()
    cache = Cache(len(blocks), block_size, num_kv_heads, head_dim)
    tables = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
    dense = []
    for row, length in enumerate(lengths):
        taken = [blocks.pop() for _ in range(counts[row])]
        tables[row, : counts[row]] = torch.tensor(taken)
        slots = torch.tensor([taken[i // block_size] * block_size + i % block_size for i in range(length)])
        pair = []
        for which in (0, 1):
            # Tokens of very different magnitude: a scale of another slot or head would show.
            magnitudes = 2 ** rand(length, num_kv_heads, 1, seed=7 + row, scale=0.5)
            found = rand(length, num_kv_heads, head_dim, seed=2 * row + which) * magnitudes
            integers, scales = quantize_rows(found)
            cache.values[which].flatten(0, 1)[slots] = integers
            cache.scales[which][slots // block_size, :, slots % block_size] = scales
            pair.append(integers.double() * scales.double()[..., None])
        dense.append(tuple(pair))
    return cache, tables, dense


def attend(ops: ModuleType, q: Tensor, cache: Cache, tables: Tensor, rows: list[list[int]]) -> Tensor:
    k_cache, v_cache, k_scales, v_scales = cache.arguments()
    bounds = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0)], dtype=torch.int32)
    positions = torch.tensor([p for row in rows for p in row])
    return ops.paged_attention(
        q, k_cache, v_cache, tables, bounds, positions, q.shape[-1] ** -0.5, k_scales, v_scales
    )


def dense_attention(q: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
    """One row by the formula, in the dtype given.  Shapes: q [H, D]; keys, values [n, Hkv, D]."""
    group = q.shape[0] // keys.shape[1]
    k, v = (part[: position + 1].repeat_interleave(group, dim=1) for part in (keys, values))
    scores = torch.einsum("hd,nhd->hn", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), v)


BATCHES: list[tuple[list[int], list[list[int]]]] = [
    ([1], [[0]]),
    ([5], [[0, 1, 2, 3, 4]]),
    ([15, 16, 17, 18], [[14], [15], [16], [17]]),  # around a group of keys
    ([63, 64, 65], [[62], [63], [64]]),  # around a tile of keys
    ([140, 1, 2, 9], [list(range(60, 140)), [0], [0, 1], [8]]),  # one long among short ones
    ([12, 6, 9], [[], [5], []]),  # streams without rows
    ([170, 11], [[2, 7, 16, 66, 169], [0, 10]]),  # rows picked here and there
]


# Pairs of batch, shape, size of a block and dtype, for every instruction set.
@grid(
    batch=BATCHES,
    shape=[(4, 2, 32), (8, 1, 96), (2, 2, 128), (40, 1, 64)],
    block_size=[3, 16, 48],
    dtype=DTYPES,
)
def test_attention(batch, shape: tuple[int, int, int], block_size: int, dtype: torch.dtype) -> None:
    (lengths, rows), (num_heads, num_kv_heads, head_dim) = batch, shape
    cache, tables, dense = paged(lengths, block_size, num_kv_heads, head_dim)
    q = rand(sum(map(len, rows)), num_heads, head_dim, dtype=dtype, seed=5)
    wanted = [(dense[i], p) for i, row in enumerate(rows) for p in row]
    exact = torch.stack([dense_attention(q[t].double(), k, v, p) for t, ((k, v), p) in enumerate(wanted)])
    plain = [dense_attention(q[t].float(), k.float(), v.float(), p) for t, ((k, v), p) in enumerate(wanted)]
    for ops in BACKENDS:
        actual = attend(ops, q, cache, tables, rows)
        assert_close_as_torch(actual, torch.stack(plain).to(dtype), exact)


# Pairs of heads, size of a block and dtype, for every instruction set.
@grid(num_heads=[2, 6, 80], block_size=[5, 16], dtype=DTYPES)  # one, several, too many heads a tile of rows
def test_rows_do_not_depend_on_their_neighbours(num_heads: int, block_size: int, dtype: torch.dtype) -> None:
    length, head_dim = 150, 64
    cache, tables, _ = paged([length], block_size, 2, head_dim)
    q = rand(length, num_heads, head_dim, dtype=dtype)

    def some(rows: list[int]) -> Tensor:
        return attend(cpu, q[rows], cache, tables, [rows])

    whole = some(list(range(length)))
    for row in (0, 1, 15, 16, 63, 64, 65, 127, 128, 149):
        assert torch.equal(some([row])[0], whole[row]), row
    for start, stop in ((0, 7), (60, 70), (3, 150), (100, 133)):
        assert torch.equal(some(list(range(start, stop))), whole[start:stop])
    assert torch.equal(some(list(range(0, 150, 7))), whole[::7])


@pytest.mark.parametrize("block_size", [5, 16, 64])
def test_unused_slots_do_not_matter(block_size: int, dtype: torch.dtype) -> None:
    lengths, rows = [33, 66, 7], [[32], [0, 40, 65], [3, 6]]
    cache, tables, _ = paged(lengths, block_size, 2, 32)
    used = ~cache.scales[0].isnan()
    q = rand(6, 4, 32, dtype=dtype)
    expected = attend(cpu, q, cache, tables, rows)
    assert expected.isfinite().all()
    for integer, scale in ((127, math.inf), (0, 0.0), (-127, 1e30)):
        other = cache.copy()
        for which in (0, 1):
            other.scales[which][~used] = scale
            other.values[which][~used.transpose(1, 2)] = integer
        assert torch.equal(attend(cpu, q, other, tables, rows), expected)


# Pairs of keys (0) or values (1), size of a block and dtype, for every instruction set.
@grid(which=[0, 1], block_size=[5, 16], dtype=DTYPES)
def test_a_row_never_reads_later_tokens(which: int, block_size: int, dtype: torch.dtype) -> None:
    """A broken token makes every later row NaN and no earlier one other than it was."""
    length = 90
    cache, tables, _ = paged([length], block_size, 2, 32)
    q, rows = rand(length, 4, 32, dtype=dtype), [list(range(length))]
    before = attend(cpu, q, cache, tables, rows)
    for place in (1, 15, 16, 44, 63, 64, 89):
        block = int(tables[0, place // block_size])
        broken = cache.copy()
        broken.scales[which, block, 1, place % block_size] = torch.nan  # heads 2 and 3 read this one
        alone = attend(reference, q[place:], broken, tables, [list(range(place, length))])
        assert alone[:, 2:].isnan().all(), place
        assert alone[:, :2].isfinite().all(), place
        after = attend(cpu, q, broken, tables, rows)
        assert after[place:, 2:].isnan().all(), place
        assert torch.equal(after[:place], before[:place]), place
        assert torch.equal(after[place:, :2], before[place:, :2]), place
        broken.scales[which, block, :, place % block_size] = 3.0
        broken.values[which, block, place % block_size] = -127
        assert torch.equal(attend(cpu, q, broken, tables, rows)[:place], before[:place]), place


def test_tokens_of_zeros(dtype: torch.dtype) -> None:
    """A scale of zero: such keys score nothing, such values add nothing; all of them, and attention is zero."""
    cache, tables, dense = paged([40], 16, 2, 32)
    for which, places in ((0, [0, 3, 39]), (1, [0, 5])):
        for place in places:
            block = int(tables[0, place // 16])
            cache.values[which, block, place % 16] = 0
            cache.scales[which, block, :, place % 16] = 0
            dense[0][which][place] = 0
    q = rand(2, 4, 32, dtype=dtype)
    exact = torch.stack([dense_attention(q[t].double(), *dense[0], p) for t, p in enumerate((0, 39))])
    actual, plain = (attend(ops, q, cache, tables, [[0, 39]]) for ops in BACKENDS)
    assert_close_as_torch(actual[1], plain[1], exact[1])
    assert (actual[0] == 0).all()


def test_a_cache_that_is_a_view_of_a_larger_one(dtype: torch.dtype) -> None:
    """Blocks that hold all layers: the strides of a block are not its size."""
    cache, tables, _ = paged([70], 16, 2, 32)
    q = rand(3, 4, 32, dtype=dtype)
    expected = attend(cpu, q, cache, tables, [[0, 33, 69]])
    large, scales = torch.zeros(len(cache.values[0]), 3, 2, 16, 2, 32, dtype=torch.int8), cache.scales
    large[:, 1] = cache.values.transpose(0, 1)
    large_scales = torch.full((len(scales[0]), 3, 2, 2, 16), torch.nan)
    large_scales[:, 1] = scales.transpose(0, 1)
    view = Cache(1, 1, 1, 32)
    view.values, view.scales = large[:, 1].transpose(0, 1), large_scales[:, 1].transpose(0, 1)
    assert torch.equal(attend(cpu, q, view, tables, [[0, 33, 69]]), expected)
