"""qk_norm_rope_store_kv: from a step's qkv to rotated queries and to keys and values in the paged cache, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_HEADS = 4  # heads of a program; the same for any number of rows, so that it is no part of a row's bits

_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
# Added and taken off again it rounds |x| < 2^22 to whole numbers, ties to even.
_ROUNDER = tl.constexpr(1.5 * 2**23)
_LEAST_MAGNITUDE = tl.constexpr(1e-35)  # as quantize_rows


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
    """Norm and rotate q and k per head, store k and v in the cache, return q: `reference` has formula and arguments.

    positions and slot_mapping may be int32 too. A row with a negative slot is padding: it stores nothing, its position
    is not looked at, and its q is zero.

    Raises:
        ValueError: head_dim is not a power of two from 16 on, a tensor is not contiguous, or scales are missing.
    """
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim={head_dim}: must be a power of two, at least 16")
    if (k_cache.dtype == torch.int8) != (k_scales is not None and v_scales is not None):
        raise ValueError(f"{k_cache.dtype} caches: int8 caches have scales, others have none")
    tensors = {"qkv": qkv, "cos_sin": cos_sin, "k_cache": k_cache, "v_cache": v_cache}
    for name, tensor in (tensors | {"k_scales": k_scales, "v_scales": v_scales}).items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is not contiguous")
    num_rows, num_heads = len(qkv), qkv.shape[1] // head_dim
    num_q_heads = num_heads - 2 * num_kv_heads
    q = torch.empty((num_rows, num_q_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_rows:
        _qk_norm_rope_store_kv_kernel[(num_rows, triton.cdiv(num_heads, _BLOCK_HEADS))](
            q, qkv, q_norm, k_norm, cos_sin, positions, slot_mapping, k_cache, v_cache, k_scales, v_scales, eps,
            NUM_HEADS=num_q_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
            BLOCK_HEADS=_BLOCK_HEADS, HAS_SCALES=k_scales is not None, num_warps=1,
        )  # fmt: skip
    return q


@triton.jit
def _quantize(a, b):
    """The rule of quantize_rows for rows given as two halves, [heads, D/2] float32 each."""
    broken = tl.sum(a * 0.0 + b * 0.0, axis=1)  # NaN where something is not finite
    a_size = tl.where(a == a, tl.minimum(tl.abs(a), _LARGEST), 0.0)
    b_size = tl.where(b == b, tl.minimum(tl.abs(b), _LARGEST), 0.0)
    top = tl.max(tl.maximum(a_size, b_size), axis=1)
    inverse = tl.where(top > _LEAST_MAGNITUDE, tl.div_rn(127.0, top), 0.0)
    scale = tl.div_rn(top, 127.0) + broken
    return _round(a * inverse[:, None]), _round(b * inverse[:, None]), scale


@triton.jit
def _round(x):
    x = tl.where(x == x, x, 0.0)
    x = tl.minimum(tl.maximum(x, -127.0), 127.0)
    return ((x + _ROUNDER) - _ROUNDER).to(tl.int8)


@triton.jit
def _qk_norm_rope_store_kv_kernel(
    out_ptr,
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """One row's heads h .. h + BLOCK_HEADS, of the query, key and value heads in a row.

    Pairs that rotate together are elements j and j + D/2 of a head, so a head is two halves, a and b.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    half: tl.constexpr = HEAD_DIM // 2
    dims = tl.arange(0, half)[None, :]
    exists = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None]
    x_ptr = qkv_ptr + row * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM) + head[:, None] * HEAD_DIM + dims
    a = tl.load(x_ptr, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + half, mask=exists, other=0.0).to(tl.float32)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    is_live = slot >= 0
    position = tl.where(is_live, tl.load(positions_ptr + row).to(tl.int64), 0)
    cos = tl.load(cos_sin_ptr + position * HEAD_DIM + dims)
    sin = tl.load(cos_sin_ptr + position * HEAD_DIM + half + dims)

    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_v = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < NUM_HEADS + 2 * NUM_KV_HEADS)
    a_norm = tl.where(is_q[:, None], tl.load(q_norm_ptr + dims), tl.load(k_norm_ptr + dims)).to(tl.float32)
    b_norm = tl.where(is_q[:, None], tl.load(q_norm_ptr + half + dims), tl.load(k_norm_ptr + half + dims)).to(
        tl.float32
    )
    root = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / HEAD_DIM + eps)[:, None]
    normed_a, normed_b = a * root * a_norm, b * root * b_norm
    rotated_a, rotated_b = normed_a * cos - normed_b * sin, normed_b * cos + normed_a * sin

    out_ptr += (row * NUM_HEADS + head[:, None]) * HEAD_DIM + dims
    out_type = out_ptr.dtype.element_ty
    tl.store(out_ptr, tl.where(is_live, rotated_a, 0.0).to(out_type), mask=is_q[:, None])
    tl.store(out_ptr + half, tl.where(is_live, rotated_b, 0.0).to(out_type), mask=is_q[:, None])

    a, b = tl.where(is_k[:, None], rotated_a, a), tl.where(is_k[:, None], rotated_b, b)
    kv_head = tl.where(is_k, head - NUM_HEADS, head - NUM_HEADS - NUM_KV_HEADS)
    offsets = (slot * NUM_KV_HEADS + kv_head[:, None]) * HEAD_DIM + dims
    if HAS_SCALES:
        a, b, scales = _quantize(a, b)
        scale_offsets = (slot // BLOCK_SIZE * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
        tl.store(k_scales_ptr + scale_offsets, scales, mask=is_k & is_live)
        tl.store(v_scales_ptr + scale_offsets, scales, mask=is_v & is_live)
    stored_type = k_ptr.dtype.element_ty
    a, b = a.to(stored_type), b.to(stored_type)
    tl.store(k_ptr + offsets, a, mask=is_k[:, None] & is_live)
    tl.store(k_ptr + offsets + half, b, mask=is_k[:, None] & is_live)
    tl.store(v_ptr + offsets, a, mask=is_v[:, None] & is_live)
    tl.store(v_ptr + offsets + half, b, mask=is_v[:, None] & is_live)
