"""qk_norm_rope_store_kv in Triton against the reference: closeness, exact copies and integers, padding rows."""

from __future__ import annotations

import math

import pytest
import torch
from native_ops import assert_close_as_torch, rand
from pairwise import grid
from torch import Tensor

from guardengine.kernels import reference
from guardengine.kernels.gpu.qkv import qk_norm_rope_store_kv
from guardengine.kernels.quantization import quantize_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = (qk_norm_rope_store_kv, reference.qk_norm_rope_store_kv)
EPS = 1e-6
SLOTS = [10, 1, 7, 0, 11]
POSITIONS = [0, 9, 3, 15, 4]


class Case:
    """Five rows of a model, and caches of twelve slots in the middle of a slab."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.qkv = rand(5, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, scale=2)
        self.norms = [1 + rand(head_dim, dtype=dtype, scale=0.1, seed=seed) for seed in (0, 9)]
        self.table = reference.rope_table(head_dim, 1e6, 16)
        self.positions, self.slots = torch.tensor(POSITIONS), torch.tensor(SLOTS)

    def caches(self, dtype: torch.dtype, block_size: int = 4) -> list[Tensor]:
        head_dim = self.table.shape[1]
        shape = (3, 2, 12 // block_size, block_size, self.num_kv_heads, head_dim)
        slab = torch.full(shape, 55 if dtype == torch.int8 else torch.nan, dtype=dtype)
        if dtype != torch.int8:
            return list(slab[1])
        scales = torch.full((3, 2, 12 // block_size, self.num_kv_heads, block_size), torch.nan)
        return [*slab[1], *scales[1]]

    def run(self, operator, caches: list[Tensor]) -> Tensor:
        return operator(
            self.qkv, *self.norms, self.table, self.positions, self.slots, *caches[:2], EPS, *caches[2:]
        )

    def exact(self, first: int, last: int, norm: Tensor) -> Tensor:
        heads = self.qkv.double().view(5, -1, self.table.shape[1])[:, first:last]
        normed = heads / (heads.square().mean(-1, keepdim=True) + EPS).sqrt() * norm.double()
        return reference.apply_rope(normed, self.table[self.positions].double())


@grid(
    shape=[(4, 2, 32, 4), (8, 1, 64, 3), (3, 3, 128, 12), (2, 1, 16, 1)],
    kv_dtype=[None, torch.bfloat16],  # None: that of the rows
    dtype=DTYPES,
)
def test_qk_norm_rope_store_kv(shape, kv_dtype, dtype) -> None:
    num_heads, num_kv_heads, head_dim, block_size = shape
    case = Case(num_heads, num_kv_heads, head_dim, dtype)
    caches = [case.caches(kv_dtype or dtype, block_size) for _ in range(2)]
    outputs = [case.run(op, c) for op, c in zip(OPERATORS, caches, strict=True)]
    assert_close_as_torch(*outputs, case.exact(0, num_heads, case.norms[0]))
    (k, v), (plain_k, plain_v) = ([cache.flatten(0, 1) for cache in pair] for pair in caches)
    keys = case.exact(num_heads, num_heads + num_kv_heads, case.norms[1])
    assert_close_as_torch(k[SLOTS], plain_k[SLOTS], keys)
    assert torch.equal(v[SLOTS], plain_v[SLOTS])
    assert torch.equal(k.isnan(), plain_k.isnan())  # no other slot was touched
    assert torch.equal(v.isnan(), plain_v.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 32), (3, 3, 128)])
def test_int8_caches(num_heads, num_kv_heads, head_dim, dtype) -> None:
    """Values have the reference's integers and scales; keys too, but where the last bit decides a tie."""
    case = Case(num_heads, num_kv_heads, head_dim, dtype)
    caches = [case.caches(torch.int8) for _ in range(2)]
    for op, pair in zip(OPERATORS, caches, strict=True):
        case.run(op, pair)
    (k, v, k_scales, v_scales), (plain_k, plain_v, plain_k_scales, plain_v_scales) = caches
    assert torch.equal(v, plain_v)
    torch.testing.assert_close(v_scales, plain_v_scales, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(k_scales, plain_k_scales, rtol=1e-6, atol=0, equal_nan=True)
    different = (k.int() - plain_k.int()).abs()
    assert different.max() <= 1
    assert different.count_nonzero() <= k.numel() // 1000


def test_int8_rounding_of_ties_extremes_and_what_is_not_finite() -> None:
    """Through values, which are only rounded: quantize_rows' integers and scales, whatever comes."""
    rows = torch.full((8, 32), 0.5)
    rows[0, :4] = torch.tensor([127.0, 1.5, 2.5, -2.5])  # scale 1: ties go to even
    rows[1] = 0.0
    rows[2] = 1e-36
    rows[3] = 1e-30
    rows[4] = 3e38
    rows[5, 3] = math.inf
    rows[6, 31] = -math.inf
    rows[7, 16] = math.nan
    cache = torch.zeros(2, 2, 4, 1, 32, dtype=torch.int8)
    scales = torch.zeros(2, 2, 1, 4)
    qk_norm_rope_store_kv(
        torch.cat((torch.ones(8, 64), rows), dim=1), torch.ones(32), torch.ones(32),
        reference.rope_table(32, 1e6, 1), torch.zeros(8, dtype=torch.int64), torch.arange(8), *cache, EPS, *scales,
    )  # fmt: skip
    expected, expected_scales = quantize_rows(rows)
    assert expected[0, :4].tolist() == [127, 2, 2, -2]
    assert torch.equal(cache[1].view(8, 32), expected)
    torch.testing.assert_close(scales[1].flatten(), expected_scales, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_padding_rows_store_nothing(index_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """Rows with slot -1 may hold NaN and a position far outside of the table."""
    case = Case(4, 2, 32, torch.float32)
    expected_caches = case.caches(kv_dtype)
    expected = case.run(qk_norm_rope_store_kv, expected_caches)
    case.positions = torch.cat((case.positions, torch.tensor([1 << 30, -5]))).to(index_dtype)
    case.slots = torch.cat((case.slots, torch.tensor([-1, -1]))).to(index_dtype)
    case.qkv = torch.cat((case.qkv, torch.full_like(case.qkv[:2], torch.nan)))
    caches = case.caches(kv_dtype)
    out = case.run(qk_norm_rope_store_kv, caches)
    assert torch.equal(out[:5], expected)
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        torch.testing.assert_close(cache, expected_cache, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_their_neighbours(dtype: torch.dtype) -> None:
    case = Case(4, 2, 32, dtype)
    caches = case.caches(dtype)
    whole = case.run(qk_norm_rope_store_kv, caches)
    qkv, positions, slots = case.qkv, case.positions, case.slots
    alone = case.caches(dtype)
    for row in range(5):
        part = slice(row, row + 1)
        case.qkv, case.positions, case.slots = qkv[part], positions[part], slots[part]
        assert torch.equal(case.run(qk_norm_rope_store_kv, alone), whole[part])
    for cache, expected in zip(alone, caches, strict=True):
        assert torch.equal(cache.nan_to_num(7), expected.nan_to_num(7))


def test_no_rows() -> None:
    case = Case(4, 2, 32, torch.float32)
    case.qkv, case.positions, case.slots = case.qkv[:0], case.positions[:0], case.slots[:0]
    assert case.run(qk_norm_rope_store_kv, case.caches(torch.float32)).shape == (0, 4, 32)


def test_what_the_kernel_does_not_take_is_refused() -> None:
    case = Case(2, 1, 48, torch.float32)
    caches = case.caches(torch.float32)
    with pytest.raises(ValueError, match="head_dim=48"):
        case.run(qk_norm_rope_store_kv, caches)
    case = Case(2, 1, 32, torch.float32)
    caches = case.caches(torch.int8)
    with pytest.raises(ValueError, match="int8 caches have scales"):
        case.run(qk_norm_rope_store_kv, caches[:2])
    k_cache, v_cache = case.caches(torch.float32)
    with pytest.raises(ValueError, match="k_cache of shape"):
        case.run(qk_norm_rope_store_kv, [k_cache.transpose(0, 1), v_cache])
