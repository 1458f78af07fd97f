"""The Qwen3 decoder and the guard heads, as functions over weights, a batch and a KV cache.

Sees tensors only: no stream, schedule or label. `ops` is a backend module of guardengine.kernels; shapes
follow the dimension key there.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from guardengine.batch import Batch
from guardengine.config import ModelConfig
from guardengine.weights import HeadWeights, LayerWeights, Weights


def forward(
    ops: ModuleType,
    config: ModelConfig,
    weights: Weights,
    cos_sin: Tensor,
    kv_cache: Tensor,
    kv_scales: Tensor | None,
    batch: Batch,
) -> Tensor:
    """Run one ragged batch: store its keys and values, return the last layer's output where a label is wanted.

    Shapes: kv_cache [layers, 2, N, S, Hkv, D] and, where it is int8, kv_scales [layers, 2, N, Hkv, S], written in
            place; cos_sin [positions, D] -> [W, E], not normed.

    Past the last layer's KV store only the W wanted rows are computed: a prompt chunk that wants none ends there.
    """
    eps = config.rms_norm_eps
    softmax_scale = config.head_dim**-0.5
    rows = batch.rows
    residual = weights.embed[batch.input_ids]
    x = ops.rms_norm(residual, weights.layers[0].input_norm, eps)
    for index, layer in enumerate(weights.layers):
        k_cache, v_cache = kv_cache[index]
        k_scales, v_scales = (None, None) if kv_scales is None else kv_scales[index]
        if index:
            x, residual = ops.fused_add_rms_norm(x, residual, layer.input_norm, eps)
        q = ops.qk_norm_rope_store_kv(
            ops.linear(x, layer.qkv),
            layer.q_norm,
            layer.k_norm,
            cos_sin,
            rows.positions,
            batch.slot_mapping,
            k_cache,
            v_cache,
            eps,
            k_scales,
            v_scales,
        )
        if index == config.num_layers - 1:
            rows = batch.label_rows
            q, residual = q[batch.label_index], residual[batch.label_index]
        attended = ops.paged_attention(
            q,
            k_cache,
            v_cache,
            batch.block_tables,
            rows.cu_seqlens_q,
            rows.positions,
            softmax_scale,
            k_scales,
            v_scales,
        )
        x = ops.linear(attended.flatten(1), layer.o)
        x, residual = ops.fused_add_rms_norm(x, residual, layer.post_norm, eps)
        x = _mlp(ops, layer, x)
    return x + residual  # type: ignore[no-any-return]


def guard_logits(
    ops: ModuleType, config: ModelConfig, heads: HeadWeights, norm: Tensor, hidden: Tensor
) -> Tensor:
    """Classify rows of `forward`'s output with both pairs of heads.  Shapes: hidden [W, E] -> [W, C] float32."""
    return ops.guard_heads(  # type: ignore[no-any-return]
        hidden, norm, heads.pre, heads.norm, heads.response, heads.query, config.rms_norm_eps
    )


def _mlp(ops: ModuleType, layer: LayerWeights, x: Tensor) -> Tensor:
    return ops.linear(ops.silu_and_mul(ops.linear(x, layer.gate_up)), layer.down)  # type: ignore[no-any-return]
