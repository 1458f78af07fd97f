"""Every operator in plain PyTorch: the specification of the fast backends.

Sums and non-linear functions are computed in float32 whatever the dtype of the tensors, and each operator
rounds once, at its output (`linear` and `paged_attention` leave both to torch, which does the same). Nothing
here knows streams, schedules or labels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from guardengine.kernels.quantization import QuantizedWeight, quantize_rows, quantize_weight
from guardengine.kernels.rope import apply_rope
from guardengine.kernels.rope import rope_table as rope_table  # an operator, the same for all


def linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """out = x weightᵀ.

    "int8": the weight's integers times their scales. "w8a8": integers times integers, exactly, times both scales:
    out[t, n] = (Σ xq[t, k] wq[n, k]) * w_scale[n] * x_scale[t], with xq the rows of x rounded by `quantize_rows`.

    Args:
        x: [T, in], float32, float16 or bfloat16.
        weight: [out, in] in x's dtype, or what `quantize` made of such a matrix.

    Returns:
        [T, out], in x's dtype.
    """
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    if not weight.rounds_rows:
        return F.linear(x.float(), weight.dequantized()).to(x.dtype)
    rows, row_scales = quantize_rows(x)
    sums = rows.double() @ weight.values.double().T  # integers below 2^53: exact
    out: Tensor = sums.float() * weight.scales[:, 0] * row_scales[:, None]
    return out.to(x.dtype)


def quantize(weight: Tensor, scheme: str) -> QuantizedWeight:
    """Round a weight matrix to int8, for `linear`.

    Args:
        weight: [out, in], any floating dtype.
        scheme: "int8" or "w8a8".

    Returns:
        The backend's own form of it.

    Raises:
        ValueError: For another scheme.
    """
    return quantize_weight(weight, scheme)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale rows to unit root mean square: out = x / sqrt(mean(x²) + eps) * weight, over the last axis.

    Args:
        x: [..., n], any floating dtype.
        weight: [n].
        eps: Added to the mean, dimensionless.

    Returns:
        [..., n], in x's dtype.

    Source: Zhang & Sennrich 2019, eq. 4.
    """
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and norm the sum.

    Args:
        x: [T, E].
        residual: [T, E], in x's dtype.
        weight: [E], the norm's.
        eps: The norm's.

    Returns:
        (rms_norm(s), s) with s = x + residual, rounded: both [T, E] in x's dtype.
    """
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """out = silu(gate) * up.

    Args:
        gate_up: [T, 2F], gate's columns first.

    Returns:
        [T, F], in gate_up's dtype.

    Source: Shazeer 2020 (SwiGLU).
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def qk_norm_rope_store_kv(
    qkv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    eps: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Norm and rotate q and k per head, store k and v in the cache, return q.

    Args:
        qkv: [T, (H + 2 Hkv) D], q then k then v.
        q_norm: [D], the weight of the queries' norm.
        k_norm: [D], of the keys'.
        cos_sin: [positions, D] float32, `rope_table`.
        positions: [T] int64.
        slot_mapping: [T] int64, distinct, in blocks that only the token's own stream has.
        k_cache: [N, S, Hkv, D], written in place.
        v_cache: The values', of the same shape and dtype.
        eps: The norms'.
        k_scales: [N, Hkv, S] float32, of an int8 cache, written in place: each head of a token is rounded by
            `quantize_rows`.
        v_scales: The values'.

    Returns:
        q [T, H, D], in qkv's dtype.
    """
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q, k, v = heads.split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    angles = cos_sin[positions]
    rotated: Tensor = apply_rope(rms_norm(q.float(), q_norm, eps), angles)
    k = apply_rope(rms_norm(k.float(), k_norm, eps), angles)
    _store(k, k_cache, k_scales, slot_mapping)
    _store(v, v_cache, v_scales, slot_mapping)
    return rotated.to(qkv.dtype)


def _store(values: Tensor, cache: Tensor, scales: Tensor | None, slot_mapping: Tensor) -> None:
    block, offset = slot_mapping // cache.shape[1], slot_mapping % cache.shape[1]
    if scales is not None:
        values, scales[block, :, offset] = quantize_rows(values)
    cache[block, offset] = values.to(cache.dtype)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    positions: Tensor,
    softmax_scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Attend causally from a ragged batch of rows over the paged KV cache.

    out[t] = softmax(q[t] · K[:p]ᵀ * softmax_scale) · V[:p],   p = positions[t] + 1, K and V of t's own stream

    Dot products and softmax are computed in float32, and rounded once, at the output.

    Args:
        q: [T, H, D], H a multiple of Hkv.
        k_cache: [N, S, Hkv, D], in q's dtype or int8. Every slot up to positions[t] of row t's stream was stored.
        v_cache: The values', of the same shape and dtype.
        block_tables: [B, M] int32, -1 past a stream's last block.
        cu_seqlens_q: [B+1] int32. Rows cu_seqlens_q[b] to cu_seqlens_q[b+1] - 1 are stream b's, in ascending order of
            position: any subset of its positions, possibly none.
        positions: [T] int64.
        softmax_scale: Usually 1 / sqrt(D).
        k_scales: [N, Hkv, S] float32, of an int8 cache.
        v_scales: The values'.

    Returns:
        [T, H, D], in q's dtype.

    Source: Vaswani 2017 eq. 1; grouped queries: Ainslie 2023; paging: Kwon 2023 section 4.
    """
    out = torch.empty_like(q)
    block_size = k_cache.shape[1]
    bounds = cu_seqlens_q.tolist()
    for stream, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        last = int(positions[end - 1])
        blocks = block_tables[stream, : last // block_size + 1]
        k, v = _gather(k_cache, k_scales, blocks, last + 1), _gather(v_cache, v_scales, blocks, last + 1)
        if k_scales is None:
            k, v, queries = k.to(q.dtype), v.to(q.dtype), q
        else:
            queries = q.float()
        for tile in range(start, end, _QUERY_TILE):
            rows = slice(tile, min(tile + _QUERY_TILE, end))
            length = int(positions[rows.stop - 1]) + 1
            visible = torch.arange(length, device=q.device) <= positions[rows, None]
            attended = F.scaled_dot_product_attention(
                queries[rows].transpose(0, 1)[None],
                k[:length].transpose(0, 1)[None],
                v[:length].transpose(0, 1)[None],
                attn_mask=None if rows.stop - rows.start == 1 else visible[None, None],
                scale=softmax_scale,
                enable_gqa=True,
            )
            out[rows] = attended[0].transpose(0, 1).to(q.dtype)
    return out


def _gather(cache: Tensor, scales: Tensor | None, blocks: Tensor, length: int) -> Tensor:
    """One stream's first `length` keys or values, [length, Hkv, D], in float32 where they are int8."""
    found = cache[blocks]
    if scales is not None:
        found = found.float() * scales[blocks].transpose(1, 2)[..., None]
    return found.flatten(0, 1)[:length]


# Rows of one stream attended at a time: keeps the mask of an 8,192-token prompt at 4 MB.
_QUERY_TILE = 512


def guard_heads(
    x: Tensor,
    final_norm: Tensor,
    pre: Tensor,
    inner_norm: Tensor,
    response_head: Tensor,
    query_head: Tensor,
    eps: float,
) -> Tensor:
    """Compute the four classifiers' logits of each row from the last layer's residual stream.

    h = rms_norm(x);  r = rms_norm(pre_response h), logits = response_head r;  the query pair likewise

    Args:
        x: [W, E], not normed.
        final_norm: [E].
        pre: [2G, E], the response pair's rows first.
        inner_norm: [2, G], response then query.
        response_head: [risks + categories, G].
        query_head: [risks + categories, G].
        eps: The norms'.

    Returns:
        [W, C] float32: the response pair's logits, then the query pair's.

    Source: Qwen3Guard Technical Report (arXiv 2510.14276) eq. 3, with RMSNorm where it writes LayerNorm.
    """
    response, query = linear(rms_norm(x, final_norm, eps), pre).chunk(2, dim=-1)
    response = rms_norm(response, inner_norm[0], eps)
    query = rms_norm(query, inner_norm[1], eps)
    # The heads are a few rows: in float32 their logits keep the digits that thresholds compare.
    return torch.cat(
        (response.float() @ response_head.float().T, query.float() @ query_head.float().T), dim=-1
    )
