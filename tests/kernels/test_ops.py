"""The reference operators against independent statements of the same formulas, in float64 or by transformers.

The error bar is the rule, not a number: at most twice the error that plain PyTorch makes at the same dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3 import modeling_qwen3 as hf

from guardengine import kernels
from guardengine.kernels import reference as ops

DTYPES = (torch.float32, torch.bfloat16)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def assert_close_as_torch(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Error against float64 at most twice plain PyTorch's at this dtype, plus one rounding of the largest value."""
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item()
    allowed += torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"error {error:.3g} is over {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 100), (3, 5, 128)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = rand(*shape, dtype=dtype, scale=3), 1 + rand(shape[-1], dtype=dtype, scale=0.1)
    module = hf.Qwen3RMSNorm(shape[-1], eps=1e-6)
    module.weight.data = weight
    x64 = x.double()
    exact = x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    assert_close_as_torch(ops.rms_norm(x, weight, 1e-6), module(x), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_eps_is_inside_the_root(dtype: torch.dtype) -> None:
    x = torch.full((1, 4), 1e-3, dtype=dtype)
    out = ops.rms_norm(x, torch.ones(4, dtype=dtype), 3e-6)
    assert out.float().mean().item() == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_add_rms_norm_is_add_then_norm(dtype: torch.dtype) -> None:
    x, residual, weight = rand(5, 64, dtype=dtype), rand(5, 64, dtype=dtype, seed=1), rand(64, dtype=dtype)
    normed, total = ops.fused_add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.rms_norm(x + residual, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    gate_up = rand(6, 2 * 48, dtype=dtype, scale=4)
    gate, up = gate_up.chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    assert_close_as_torch(ops.silu_and_mul(gate_up), torch.nn.functional.silu(gate) * up, exact)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_rope_matches_transformers(head_dim: int) -> None:
    config = hf.Qwen3Config(
        head_dim=head_dim, hidden_size=4 * head_dim, num_attention_heads=4, num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    positions = torch.tensor([0, 1, 5, 77, 8000])
    x = rand(5, 3, head_dim)
    cos, sin = hf.Qwen3RotaryEmbedding(config)(x, positions[None])
    expected, _ = hf.apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    actual = ops.apply_rope(x, ops.rope_table(head_dim, 1e6, 8192)[positions])
    torch.testing.assert_close(actual, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope_store_kv(dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_dim = 4, 2, 32
    qkv = rand(3, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    q_norm, k_norm = (
        1 + rand(head_dim, dtype=dtype, scale=0.1),
        1 + rand(head_dim, dtype=dtype, seed=9, scale=0.1),
    )
    k_cache = torch.full((3, 4, num_kv_heads, head_dim), torch.nan, dtype=dtype)
    v_cache = k_cache.clone()
    table, positions = ops.rope_table(head_dim, 1e6, 16), torch.tensor([0, 9, 3])
    slots = torch.tensor([10, 1, 7])
    q = ops.qk_norm_rope_store_kv(qkv, q_norm, k_norm, table, positions, slots, k_cache, v_cache, 1e-6)

    heads = qkv.view(3, -1, head_dim)
    plain_q = ops.apply_rope(ops.rms_norm(heads[:, :4].float(), q_norm, 1e-6), table[positions])
    plain_k = ops.apply_rope(ops.rms_norm(heads[:, 4:6].float(), k_norm, 1e-6), table[positions])
    assert torch.equal(q, plain_q.to(dtype))
    assert torch.equal(k_cache.flatten(0, 1)[slots], plain_k.to(dtype))
    assert torch.equal(v_cache.flatten(0, 1)[slots], heads[:, 6:])
    untouched = [slot for slot in range(12) if slot not in slots.tolist()]
    assert k_cache.flatten(0, 1)[untouched].isnan().all()
    assert v_cache.flatten(0, 1)[untouched].isnan().all()


def paged(lengths: list[int], block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype):
    """Keys and values of streams of these lengths, dense and scattered over a cache poisoned with NaN."""
    dense = [
        (
            rand(n, num_kv_heads, head_dim, dtype=dtype, seed=i),
            rand(n, num_kv_heads, head_dim, dtype=dtype, seed=-i),
        )
        for i, n in enumerate(lengths)
    ]
    counts = [-(-n // block_size) for n in lengths]
    shuffled = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(1)).tolist()
    k_cache = torch.full((len(shuffled), block_size, num_kv_heads, head_dim), torch.nan, dtype=dtype)
    v_cache = k_cache.clone()
    tables = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
    for row, (keys, values) in enumerate(dense):
        for index in range(counts[row]):
            block = shuffled.pop()
            tables[row, index] = block
            part = slice(index * block_size, (index + 1) * block_size)
            k_cache[block, : len(keys[part])] = keys[part]
            v_cache[block, : len(values[part])] = values[part]
    return dense, k_cache, v_cache, tables


def dense_attention(q: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
    """One row by the formula, in the dtype given.  Shapes: q [H, D]; keys, values [n, Hkv, D]."""
    group = q.shape[0] // keys.shape[1]
    k = keys[: position + 1].repeat_interleave(group, dim=1)
    v = values[: position + 1].repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,nhd->hn", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hn,nhd->hd", scores.softmax(-1), v)


BATCHES: list[tuple[list[int], list[list[int]]]] = [
    ([1], [[0]]),
    ([4], [[3]]),
    ([5], [[0, 1, 2, 3, 4]]),
    ([3, 4, 5], [[2], [3], [4]]),  # one short of a block, a block, one more
    ([40, 1, 2, 9], [[36, 37, 38, 39], [0], [0, 1], [8]]),  # one long among short ones
    ([12, 6, 9], [[], [5], []]),  # streams without rows
    ([17, 11], [[2, 7, 16], [0, 10]]),  # rows picked here and there
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 32), (8, 2, 64), (2, 2, 128)])
@pytest.mark.parametrize(("lengths", "rows"), BATCHES)
def test_paged_attention(lengths, rows, num_heads, num_kv_heads, head_dim, dtype) -> None:
    dense, k_cache, v_cache, tables = paged(lengths, 4, num_kv_heads, head_dim, dtype)
    positions = torch.tensor([p for row in rows for p in row])
    cu_seqlens = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0)], dtype=torch.int32)
    q = rand(len(positions), num_heads, head_dim, dtype=dtype, seed=5)
    out = ops.paged_attention(q, k_cache, v_cache, tables, cu_seqlens, positions, head_dim**-0.5)

    pairs = [(dense[i], p) for i, row in enumerate(rows) for p in row]
    plain = torch.stack([dense_attention(q[t], k, v, p) for t, ((k, v), p) in enumerate(pairs)])
    exact = torch.stack(
        [dense_attention(q[t].double(), k.double(), v.double(), p) for t, ((k, v), p) in enumerate(pairs)]
    )
    assert_close_as_torch(out, plain, exact)


def test_paged_attention_tiles_long_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    _, k_cache, v_cache, tables = paged([23], 4, 2, 32, torch.float32)
    q, positions = rand(20, 4, 32), torch.arange(3, 23)
    arguments = (q, k_cache, v_cache, tables, torch.tensor([0, 20]), positions, 0.2)
    whole = ops.paged_attention(*arguments)
    monkeypatch.setattr(ops, "_QUERY_TILE", 6)
    torch.testing.assert_close(ops.paged_attention(*arguments), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_guard_heads(dtype: torch.dtype) -> None:
    hidden, inner, num_rows = 48, 16, 5
    x = rand(num_rows, hidden, dtype=dtype)
    final_norm, inner_norm = (
        1 + rand(hidden, dtype=dtype, scale=0.1),
        1 + rand(2, inner, dtype=dtype, scale=0.1),
    )
    pre = rand(2 * inner, hidden, dtype=dtype, scale=0.2)
    response, query = rand(11, inner, dtype=dtype), rand(12, inner, dtype=dtype)

    def formula(norm: Callable[[Tensor, Tensor], Tensor], cast: Callable[[Tensor], Tensor]) -> Tensor:
        h = norm(cast(x), cast(final_norm))
        r = norm(h @ cast(pre[:inner]).T, cast(inner_norm[0])) @ cast(response).T
        q = norm(h @ cast(pre[inner:]).T, cast(inner_norm[1])) @ cast(query).T
        return torch.cat((r, q), dim=-1)

    def norm64(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
        module = hf.Qwen3RMSNorm(len(weight), eps=1e-6)
        module.weight.data = weight
        return module(x)

    actual = ops.guard_heads(x, final_norm, pre, inner_norm, response, query, 1e-6)
    assert actual.dtype == torch.float32
    assert_close_as_torch(actual, formula(plain_norm, lambda t: t), formula(norm64, Tensor.double))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(KeyError):
        kernels.load("os")
