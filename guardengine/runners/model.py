"""The Qwen3 decoder and the guard heads, as functions over a model on a device and a batch.

Sees tensors only: no stream, schedule or label. Shapes follow the dimension key of guardengine.kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guardengine.checkpoint.model_config import ModelConfig
from guardengine.checkpoint.weights import HeadWeights, LayerWeights, Weights
from guardengine.errors import CheckpointError
from guardengine.runners.batch import Batch
from guardengine.runners.kv_cache import KVCache
from guardengine.runners.operators import FusedOperators, Operators
from guardengine.runners.step_inputs import StepInputs


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """A model on a device: everything that is the same in each of its steps."""

    ops: Operators
    config: ModelConfig
    weights: Weights
    cos_sin: Tensor  # [positions, D] float32, `rope_table`
    kv_cache: KVCache  # with its layers first; steps write to it

    @property
    def heads(self) -> HeadWeights:
        """The guard heads. Raises CheckpointError for a checkpoint that has none."""
        if self.weights.heads is None:
            raise CheckpointError("the checkpoint has no guard heads; use a Qwen3Guard-Stream checkpoint")
        return self.weights.heads


@dataclass(frozen=True, slots=True)
class FusedModel(DeviceModel):
    """One whose backend has fused operators."""

    ops: FusedOperators


class StepBuffers(NamedTuple):
    """Memory that all steps of a device share, one after another; what is `Any` is in the backend's own form."""

    workspace: Any  # of matrix products
    attention: Any
    sizes: Any  # classes of each classifier
    scores: Tensor  # [R, 2C + 4] float32: logits, each classifier's softmax, the four classes chosen


def forward(model: DeviceModel, batch: Batch) -> Tensor:
    """Run one ragged batch: store its keys and values, compute the last layer's output where a label is wanted.

    Args:
        model: Its KV cache is written to.
        batch: On the model's device.

    Returns:
        [W, E] in the model's dtype, not normed. Past the last layer's keys and values only the W wanted rows are
        computed: a prompt chunk that wants none ends there.
    """
    x, residual = _first_norm(model, batch.input_ids)
    rows = batch.rows
    for index, layer in enumerate(model.weights.layers):
        if index:
            x, residual = _add_norm(model, x, residual, layer.input_norm)
        q = _store(model, index, model.ops.linear(x, layer.qkv), rows.positions, batch.slot_mapping)
        if index == model.config.num_layers - 1:
            rows = batch.label_rows
            q, residual = q[batch.label_index], residual[batch.label_index]
        keys, values, *scales = model.kv_cache.layer(index)
        attended = model.ops.paged_attention(
            q, keys, values, batch.block_tables, rows.cu_seqlens_q, rows.positions, _scale(model), *scales
        )
        x, residual = _rest_of_layer(model, layer, attended, residual)
    return x + residual


def _planned_forward(model: FusedModel, step: StepInputs) -> Tensor:
    """`forward` of all of a step's rows, with attention's plan made before.  -> [R, E]"""
    x, residual = _first_norm(model, step.input_ids)
    for index, layer in enumerate(model.weights.layers):
        if index:
            x, residual = _add_norm(model, x, residual, layer.input_norm)
        q = _store(model, index, model.ops.linear(x, layer.qkv), step.positions, step.slot_mapping)
        keys, values, *scales = model.kv_cache.layer(index)
        attended = model.ops.planned_attention(
            q, keys, values, step.plan, step.positions, _scale(model), *scales, scratch=None
        )
        x, residual = _rest_of_layer(model, layer, attended, residual)
    return x + residual


def fused_forward(model: FusedModel, step: StepInputs, buffers: StepBuffers) -> None:
    """Run a small step with a backend's fused operators: `forward` and `guard_logits` in 6 launches a layer and 2.

    Everything that differs between steps is read on the device, so what this launches can be captured in a graph.

    Args:
        model: Its KV cache is written to.
        step: On the device; at most SMALL_ROWS rows, of which padding is not stored.
        buffers: `scores` is written in its first `num_labels` rows.
    """
    ops, eps, workspace = model.ops, model.config.rms_norm_eps, buffers.workspace
    residual = torch.index_select(model.weights.embed, 0, step.input_ids)
    for index, layer in enumerate(model.weights.layers):
        qkv = ops.norm_linear(residual, layer.input_norm, eps, layer.qkv, workspace=workspace)
        q = _store(model, index, qkv, step.positions, step.slot_mapping)
        keys, values, *scales = model.kv_cache.layer(index)
        attended = ops.planned_attention(
            q, keys, values, step.plan, step.positions, _scale(model), *scales, scratch=buffers.attention
        )
        ops.linear_add(attended.flatten(1), layer.o, residual, workspace=workspace)
        hidden = ops.norm_gate_up(residual, layer.post_norm, eps, layer.gate_up, workspace=workspace)
        ops.linear_add(hidden, layer.down, residual, workspace=workspace)
    _score(model, residual, step, buffers)


def scored_forward(model: FusedModel, step: StepInputs, buffers: StepBuffers) -> None:
    """`fused_forward` for steps of more rows than fused operators take: one operator after the other, over all rows."""
    _score(model, _planned_forward(model, step), step, buffers)


def _score(model: FusedModel, hidden: Tensor, step: StepInputs, buffers: StepBuffers) -> None:
    heads = model.heads
    model.ops.guard_scores(
        hidden,
        step.label_index,
        step.num_labels,
        model.weights.norm,
        heads.pre,
        heads.norm,
        heads.response,
        heads.query,
        model.config.rms_norm_eps,
        buffers.sizes,
        out=buffers.scores[: len(step.label_index)],
        workspace=buffers.workspace,
    )


def guard_logits(model: DeviceModel, hidden: Tensor) -> Tensor:
    """Classify rows of `forward`'s output with both pairs of heads.  Shapes: hidden [W, E] -> [W, C] float32."""
    heads, eps = model.heads, model.config.rms_norm_eps
    return model.ops.guard_heads(
        hidden, model.weights.norm, heads.pre, heads.norm, heads.response, heads.query, eps
    )


def final_rows(model: DeviceModel, hidden: Tensor) -> Tensor:
    """What a language model's head is multiplied with.  Shapes: hidden [W, E], `forward`'s -> [W, E] float32."""
    return model.ops.rms_norm(hidden, model.weights.norm, model.config.rms_norm_eps).float()


def _scale(model: DeviceModel) -> float:
    """Of attention's dot products."""
    scale: float = model.config.head_dim**-0.5
    return scale


def _first_norm(model: DeviceModel, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The first layer's normed input, and the residual stream [T, E], which begins as embeddings."""
    residual = model.weights.embed[input_ids]
    norm = model.weights.layers[0].input_norm
    return model.ops.rms_norm(residual, norm, model.config.rms_norm_eps), residual


def _add_norm(model: DeviceModel, x: Tensor, residual: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    return model.ops.fused_add_rms_norm(x, residual, norm, model.config.rms_norm_eps)


def _store(model: DeviceModel, index: int, qkv: Tensor, positions: Tensor, slot_mapping: Tensor) -> Tensor:
    """Store a layer's keys and values; returns its queries [T, H, D]."""
    layer = model.weights.layers[index]
    keys, values, *scales = model.kv_cache.layer(index)
    return model.ops.qk_norm_rope_store_kv(
        qkv,
        layer.q_norm,
        layer.k_norm,
        model.cos_sin,
        positions,
        slot_mapping,
        keys,
        values,
        model.config.rms_norm_eps,
        *scales,
    )


def _rest_of_layer(
    model: DeviceModel, layer: LayerWeights, attended: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """What follows attention [T, H, D]: the layer's output, still to be added, and the residual stream."""
    ops = model.ops
    x, residual = _add_norm(model, ops.linear(attended.flatten(1), layer.o), residual, layer.post_norm)
    return ops.linear(ops.silu_and_mul(ops.linear(x, layer.gate_up)), layer.down), residual
