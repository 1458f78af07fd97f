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


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """out = x weightᵀ.  Shapes: x [T, in], weight [out, in] -> [T, out]."""
    return F.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale rows to unit root mean square: out = x / sqrt(mean(x²) + eps) * weight, over the last axis.

    Shapes:  x, out [..., n]; weight [n].
    Source:  Zhang & Sennrich 2019, eq. 4.
    """
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and norm the sum: s = x + residual (rounded); returns (rms_norm(s), s).

    Shapes: x, residual and both outputs [T, E]; weight [E].
    """
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """out = silu(gate) * up.  Shapes: gate_up [T, 2F], gate first -> [T, F].  Source: Shazeer 2020 (SwiGLU)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def rope_table(head_dim: int, theta: float, num_positions: int) -> Tensor:
    """Cosines and sines of RoPE's angles, position * theta^(-2j/D).

    Shapes: out [num_positions, D] float32: D/2 cosines, then D/2 sines.
    Source: Su 2021; Qwen3's (half, half) pairing, see `apply_rope`.
    """
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate pair (j, j + D/2) of each head by its angle: (a cos - b sin, b cos + a sin).

    Shapes: x, out [T, heads, D] float32; cos_sin [T, D], the rows of `rope_table` at each token's position.
    """
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


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
) -> Tensor:
    """Norm and rotate q and k per head, store k and v in the cache, return q.

    Shapes:   qkv [T, (H + 2 Hkv) D], q then k then v; q_norm, k_norm [D]; cos_sin [positions, D] float32;
              positions, slot_mapping [T] int64; k_cache, v_cache [N, S, Hkv, D], written in place -> q [T, H, D].
    Requires: slots are distinct and lie in blocks that only the token's own stream holds.
    """
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q, k, v = heads.split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    angles = cos_sin[positions]
    q = apply_rope(rms_norm(q.float(), q_norm, eps), angles)
    k = apply_rope(rms_norm(k.float(), k_norm, eps), angles)
    k_cache.view(-1, num_kv_heads, head_dim)[slot_mapping] = k.to(k_cache.dtype)
    v_cache.view(-1, num_kv_heads, head_dim)[slot_mapping] = v.to(v_cache.dtype)
    return q.to(qkv.dtype)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    positions: Tensor,
    softmax_scale: float,
) -> Tensor:
    """Attend causally from a ragged batch of rows over the paged KV cache.

    out[t] = softmax(q[t] · K[:p]ᵀ * softmax_scale) · V[:p],   p = positions[t] + 1, K and V of t's own stream

    Shapes:   q, out [T, H, D]; k_cache, v_cache [N, S, Hkv, D]; block_tables [B, M] int32 (-1 past a stream's
              end); cu_seqlens_q [B+1] int32, rows cu_seqlens_q[b]:cu_seqlens_q[b+1] are stream b's, in
              ascending order of position, any subset of its positions and possibly none; positions [T] int64.
    Dtypes:   q and caches bf16 or fp32; dot products and softmax in fp32; rounded at the output.
    Requires: H % Hkv == 0; every slot up to positions[t] of t's stream was stored.
    Source:   Vaswani 2017 eq. 1; grouped queries: Ainslie 2023; paging: Kwon 2023 section 4.
    """
    out = torch.empty_like(q)
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    bounds = cu_seqlens_q.tolist()
    for stream, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        last = int(positions[end - 1])
        blocks = block_tables[stream, : last // block_size + 1]
        k = k_cache[blocks].view(-1, num_kv_heads, head_dim)[: last + 1]
        v = v_cache[blocks].view(-1, num_kv_heads, head_dim)[: last + 1]
        for tile in range(start, end, _QUERY_TILE):
            rows = slice(tile, min(tile + _QUERY_TILE, end))
            length = int(positions[rows.stop - 1]) + 1
            visible = torch.arange(length, device=q.device) <= positions[rows, None]
            attended = F.scaled_dot_product_attention(
                q[rows].transpose(0, 1)[None],
                k[:length].to(q.dtype).transpose(0, 1)[None],
                v[:length].to(q.dtype).transpose(0, 1)[None],
                attn_mask=None if rows.stop - rows.start == 1 else visible[None, None],
                scale=softmax_scale,
                enable_gqa=True,
            )
            out[rows] = attended[0].transpose(0, 1)
    return out


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

    Shapes:  x [W, E]; final_norm [E]; pre [2G, E], response rows first; inner_norm [2, G]; response_head
             [risks + categories, G]; query_head likewise -> [W, C] float32, response logits then query logits.
    Source:  Qwen3Guard Technical Report (arXiv 2510.14276) eq. 3, with RMSNorm where it writes LayerNorm.
    """
    response, query = linear(rms_norm(x, final_norm, eps), pre).chunk(2, dim=-1)
    response = rms_norm(response, inner_norm[0], eps)
    query = rms_norm(query, inner_norm[1], eps)
    # The heads are a few rows: in float32 their logits keep the digits that thresholds compare.
    return torch.cat(
        (response.float() @ response_head.float().T, query.float() @ query_head.float().T), dim=-1
    )
