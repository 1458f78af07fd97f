"""The Qwen3 decoder and the guard heads, as functions over weights, a batch and a KV cache.

Sees tensors only: no stream, schedule or label. `ops` is a backend module of guardengine.kernels; shapes
follow the dimension key there.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guardengine.checkpoint.model_config import ModelConfig
from guardengine.checkpoint.weights import HeadWeights, LayerWeights, Weights
from guardengine.runners.batch import Batch, Rows
from guardengine.runners.step_inputs import StepInputs


class StepScratch(NamedTuple):
    """Memory that fused operators share between launches, in the backend's own form."""

    workspace: Any  # of matrix products
    attention: Any


def forward(
    ops: ModuleType,
    config: ModelConfig,
    weights: Weights,
    cos_sin: Tensor,
    kv_cache: Tensor,
    kv_scales: Tensor | None,
    batch: Batch,
    plan: Tensor | None = None,
) -> Tensor:
    """Run one ragged batch: store its keys and values, return the last layer's output where a label is wanted.

    Shapes: kv_cache [layers, 2, N, S, Hkv, D] and, where it is int8, kv_scales [layers, 2, N, Hkv, S], written in
            place; cos_sin [positions, D] -> [W, E], not normed.

    Past the last layer's KV store only the W wanted rows are computed: a prompt chunk that wants none ends there.
    With `plan`, attention's of all rows, made before, all rows are: the output is [T, E].
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
        if index == config.num_layers - 1 and plan is None:
            rows = batch.label_rows
            q, residual = q[batch.label_index], residual[batch.label_index]
        attention = (softmax_scale, k_scales, v_scales)
        if plan is None:
            attended = ops.paged_attention(
                q, k_cache, v_cache, batch.block_tables, rows.cu_seqlens_q, rows.positions, *attention
            )
        else:
            attended = ops.planned_attention(
                q, k_cache, v_cache, plan, rows.positions, *attention, scratch=None
            )
        x = ops.linear(attended.flatten(1), layer.o)
        x, residual = ops.fused_add_rms_norm(x, residual, layer.post_norm, eps)
        x = _mlp(ops, layer, x)
    return x + residual  # type: ignore[no-any-return]


def fused_forward(
    ops: ModuleType,
    config: ModelConfig,
    weights: Weights,
    heads: HeadWeights,
    cos_sin: Tensor,
    kv_cache: Tensor,
    kv_scales: Tensor | None,
    step: StepInputs,
    scratch: StepScratch,
    sizes: Any,
    scores: Tensor,
) -> None:
    """Run a small step with a backend's fused operators: `forward` and `guard_logits` in 6 launches a layer and 2.

    Shapes: scores [R, 2C + 4] float32, written in its first `num_labels` rows: logits, each classifier's softmax,
            the classes chosen. `sizes`: classes of each classifier, in the backend's own form.

    Everything that differs between steps is read on the device, so what this launches can be captured in a graph.
    """
    eps = config.rms_norm_eps
    softmax_scale = config.head_dim**-0.5
    workspace, attention = scratch
    residual = torch.index_select(weights.embed, 0, step.input_ids)
    for index, layer in enumerate(weights.layers):
        k_cache, v_cache = kv_cache[index]
        k_scales, v_scales = (None, None) if kv_scales is None else kv_scales[index]
        q = ops.qk_norm_rope_store_kv(
            ops.norm_linear(residual, layer.input_norm, eps, layer.qkv, workspace=workspace),
            layer.q_norm,
            layer.k_norm,
            cos_sin,
            step.positions,
            step.slot_mapping,
            k_cache,
            v_cache,
            eps,
            k_scales,
            v_scales,
        )
        attended = ops.planned_attention(
            q,
            k_cache,
            v_cache,
            step.plan,
            step.positions,
            softmax_scale,
            k_scales,
            v_scales,
            scratch=attention,
        )
        ops.linear_add(attended.flatten(1), layer.o, residual, workspace=workspace)
        hidden = ops.norm_gate_up(residual, layer.post_norm, eps, layer.gate_up, workspace=workspace)
        ops.linear_add(hidden, layer.down, residual, workspace=workspace)
    _score(ops, config, weights, heads, residual, step, scratch, sizes, scores)


def scored_forward(
    ops: ModuleType,
    config: ModelConfig,
    weights: Weights,
    heads: HeadWeights,
    cos_sin: Tensor,
    kv_cache: Tensor,
    kv_scales: Tensor | None,
    step: StepInputs,
    scratch: StepScratch,
    sizes: Any,
    scores: Tensor,
) -> None:
    """`fused_forward` for steps of more rows than fused operators take: `forward` over all rows, and the scores."""
    none = step.positions[:0]  # which rows are whose, and their blocks, are in the plan
    rows = Rows(step.positions, none)
    batch = Batch(step.input_ids, rows, step.slot_mapping, none, none, rows)
    hidden = forward(ops, config, weights, cos_sin, kv_cache, kv_scales, batch, step.plan)
    _score(ops, config, weights, heads, hidden, step, scratch, sizes, scores)


def _score(
    ops: ModuleType,
    config: ModelConfig,
    weights: Weights,
    heads: HeadWeights,
    hidden: Tensor,
    step: StepInputs,
    scratch: StepScratch,
    sizes: Any,
    scores: Tensor,
) -> None:
    ops.guard_scores(
        hidden,
        step.label_index,
        step.num_labels,
        weights.norm,
        heads.pre,
        heads.norm,
        heads.response,
        heads.query,
        config.rms_norm_eps,
        sizes,
        out=scores[: len(step.label_index)],
        workspace=scratch.workspace,
    )


def guard_logits(
    ops: ModuleType, config: ModelConfig, heads: HeadWeights, norm: Tensor, hidden: Tensor
) -> Tensor:
    """Classify rows of `forward`'s output with both pairs of heads.  Shapes: hidden [W, E] -> [W, C] float32."""
    return ops.guard_heads(  # type: ignore[no-any-return]
        hidden, norm, heads.pre, heads.norm, heads.response, heads.query, config.rms_norm_eps
    )


def final_rows(ops: ModuleType, config: ModelConfig, norm: Tensor, hidden: Tensor) -> Tensor:
    """What a language model's head is multiplied with.  Shapes: hidden [W, E], `forward`'s -> [W, E] float32."""
    return ops.rms_norm(hidden, norm, config.rms_norm_eps).float()  # type: ignore[no-any-return]


def _mlp(ops: ModuleType, layer: LayerWeights, x: Tensor) -> Tensor:
    return ops.linear(ops.silu_and_mul(ops.linear(x, layer.gate_up)), layer.down)  # type: ignore[no-any-return]
