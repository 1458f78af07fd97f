"""The operators in C++ (csrc/), for CPUs: the kernels that the engine's cpu backend is made of, one at a time.

The engine runs whole steps in one native call (guardengine.runners.cpu_runner) and does not come through here; these
are the same kernels for tests and measurements, with `reference`'s signatures and contracts. Head dimensions must be
multiples of 32. GUARDENGINE_ISA chooses an instruction set; as many threads as torch has.

A row of any result is the same bits whatever other rows are computed with it and by however many threads.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from guardengine.kernels import abi, native
from guardengine.kernels.native import DTYPES
from guardengine.kernels.quantization import check_scheme
from guardengine.kernels.rope import rope_table as rope_table  # an operator, the same for all


@lru_cache(maxsize=1)
def _workers_for(isa: str, num_threads: int) -> native.Workers:
    return native.Workers(isa, num_threads)


def _workers() -> native.Workers:
    return _workers_for(native.choose_isa(), torch.get_num_threads())


def linear(x: Tensor, weight: Tensor | native.Packed) -> Tensor:
    return _linear(x, weight, is_float_out=False)


def quantize(weight: Tensor, scheme: str) -> native.Packed:
    check_scheme(scheme)
    return native.Packed(_workers(), weight, scheme)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # Converted tensors get a name: a pointer keeps nothing alive.
    rows, weight, n = x.contiguous(), weight.float().contiguous(), x.shape[-1]
    out = torch.empty_like(rows)
    native.check(
        native.library().ge_rms_norm(
            _workers().handle,
            DTYPES[x.dtype],
            rows.data_ptr(),
            weight.data_ptr(),
            eps,
            rows.numel() // n,
            n,
            out.data_ptr(),
        )
    )
    return out


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    num_rows, width = gate_up.shape
    out = gate_up.new_empty(num_rows, width // 2)
    native.check(
        native.library().ge_silu_and_mul(
            _workers().handle,
            DTYPES[out.dtype],
            gate_up.data_ptr(),
            num_rows,
            width // 2,
            out.data_ptr(),
        )
    )
    return out


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
    qkv, cos_sin = qkv.contiguous(), cos_sin.contiguous()
    q_norm, k_norm = q_norm.float().contiguous(), k_norm.float().contiguous()
    positions, slot_mapping = positions.contiguous(), slot_mapping.contiguous()
    num_rows, (num_kv_heads, head_dim) = len(qkv), k_cache.shape[2:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q = qkv.new_empty(num_rows, num_heads, head_dim)
    native.check(
        native.library().ge_qk_norm_rope_store_kv(
            _workers().handle,
            DTYPES[qkv.dtype],
            ctypes.byref(_cache(num_heads, k_cache, v_cache, k_scales, v_scales)),
            qkv.data_ptr(),
            num_rows,
            q_norm.data_ptr(),
            k_norm.data_ptr(),
            cos_sin.data_ptr(),
            positions.data_ptr(),
            slot_mapping.data_ptr(),
            eps,
            q.data_ptr(),
        )
    )
    return q


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
    q, tables = q.contiguous(), block_tables.to(torch.int32).contiguous()
    bounds, positions = cu_seqlens_q.to(torch.int32).contiguous(), positions.contiguous()
    out = torch.empty_like(q)
    native.check(
        native.library().ge_paged_attention(
            _workers().handle,
            DTYPES[q.dtype],
            ctypes.byref(_cache(q.shape[1], k_cache, v_cache, k_scales, v_scales)),
            q.data_ptr(),
            len(q),
            tables.data_ptr(),
            tables.shape[1],
            bounds.data_ptr(),
            len(bounds) - 1,
            positions.data_ptr(),
            softmax_scale,
            out.data_ptr(),
        )
    )
    return out


def guard_heads(
    x: Tensor,
    final_norm: Tensor,
    pre: Tensor,
    inner_norm: Tensor,
    response_head: Tensor,
    query_head: Tensor,
    eps: float,
) -> Tensor:
    response, query = linear(rms_norm(x, final_norm, eps), pre).chunk(2, dim=-1)
    logits = [
        _linear(rms_norm(side, norm, eps), head, is_float_out=True)
        for side, norm, head in zip((response, query), inner_norm, (response_head, query_head), strict=True)
    ]
    return torch.cat(logits, dim=-1)


def _linear(x: Tensor, weight: Tensor | native.Packed, *, is_float_out: bool) -> Tensor:
    """Packs a plain weight on every call, which the engine does once."""
    packed = weight if isinstance(weight, native.Packed) else native.Packed(_workers(), weight)
    out: Tensor = native.linear(_workers(), x, packed, is_float_out=is_float_out)
    return out


def _cache(
    num_heads: int, k_cache: Tensor, v_cache: Tensor, k_scales: Tensor | None, v_scales: Tensor | None
) -> abi.CacheStruct:
    """Addresses and strides of the caches, which may be views of a larger one."""
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    if head_dim % 32 or head_dim > abi.MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim={head_dim}: these kernels need a multiple of 32 up to {abi.MAX_HEAD_DIM}; use the "
            "reference backend"
        )
    block, token, head, value = k_cache.stride()
    if v_cache.stride() != k_cache.stride() or value != 1:
        raise ValueError(
            f"k_cache has strides {k_cache.stride()}, v_cache {v_cache.stride()}: equal ones are needed"
        )
    struct = abi.CacheStruct(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        kv_dtype=DTYPES[k_cache.dtype],
        is_tiled=False,
        block_stride=block,
        token_stride=token,
        head_stride=head,
        keys=k_cache.data_ptr(),
        values=v_cache.data_ptr(),
    )
    if k_scales is not None and v_scales is not None:
        if v_scales.stride() != k_scales.stride() or k_scales.stride(2) != 1:
            raise ValueError(
                f"k_scales has strides {k_scales.stride()}, v_scales {v_scales.stride()}: equal ones are needed"
            )
        struct.scale_block_stride, struct.scale_head_stride, _ = k_scales.stride()
        struct.key_scales, struct.value_scales = k_scales.data_ptr(), v_scales.data_ptr()
    return struct
