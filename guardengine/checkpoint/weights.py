"""Weights: the tensors that the model runs on, fused, in one dtype on one device.

Knows which tensors a ModelConfig needs. Every tensor is copied once, from the mapped file to its final place, so
loading takes little more memory than the weights themselves.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from guardengine.checkpoint.files import Checkpoint, shorten
from guardengine.checkpoint.model_config import ModelConfig
from guardengine.errors import CheckpointError, ConfigError
from guardengine.kernels.quantization import QuantizedWeight, quantize_weight

_NUM_NAMES_SHOWN = 8
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
# The keys of config.json that give a tensor its size, by the part of its name before ".weight". For errors.
_SIZED_BY = {
    "embed_tokens": "vocab_size, hidden_size",
    "lm_head": "vocab_size, hidden_size",
    "q_proj": "num_attention_heads, head_dim, hidden_size",
    "o_proj": "num_attention_heads, head_dim, hidden_size",
    "k_proj": "num_key_value_heads, head_dim, hidden_size",
    "v_proj": "num_key_value_heads, head_dim, hidden_size",
    "q_norm": "head_dim",
    "k_norm": "head_dim",
    "gate_proj": "intermediate_size, hidden_size",
    "up_proj": "intermediate_size, hidden_size",
    "down_proj": "intermediate_size, hidden_size",
    "risk_level_category_pre": "guard_inner_size, hidden_size",
    "query_risk_level_category_pre": "guard_inner_size, hidden_size",
    "risk_level_category_layernorm": "guard_inner_size",
    "query_risk_level_category_layernorm": "guard_inner_size",
    "risk_level_head": "num_risk_level, guard_inner_size",
    "category_head": "num_category, guard_inner_size",
    "query_risk_level_head": "num_query_risk_level, guard_inner_size",
    "query_category_head": "num_query_category, guard_inner_size",
}

Matrix: TypeAlias = "Tensor | QuantizedWeight"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of one decoder layer. Shapes: E hidden_size, H heads, Hkv key and value heads, D head_dim, F
    intermediate_size."""

    input_norm: Tensor  # [E]
    qkv: Matrix  # [(H + 2 * Hkv) * D, E]: query, key, value rows
    q_norm: Tensor  # [D]
    k_norm: Tensor  # [D]
    o: Matrix  # [E, H * D]
    post_norm: Tensor  # [E]
    gate_up: Matrix  # [2 * F, E]: gate, up rows
    down: Matrix  # [E, F]


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """The guard heads of a Stream checkpoint. G is guard_inner_size, R and C the numbers of risks and categories;
    response comes before query."""

    pre: Tensor  # [2 * G, E]: response, query rows
    norm: Tensor  # [2, G]: response, query
    response: Tensor  # [R + C, G]: risk, category rows
    query: Tensor  # [R + C, G]: risk, category rows


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of one model. Every tensor owns its memory, so the files may be closed. V is vocab_size."""

    embed: Tensor  # [V, E]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [E]
    heads: HeadWeights | None  # None for Gen
    lm_head: Tensor | None  # [V, E]; None for Stream; `embed` itself when tied
    quantization: str | None = None  # of the layers' matrices


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint with this config must have: stored name -> shape, in the order of the model."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        layer = f"model.layers.{index}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[layer + "self_attn.q_proj.weight"] = (q_rows, hidden)
        shapes[layer + "self_attn.k_proj.weight"] = (kv_rows, hidden)
        shapes[layer + "self_attn.v_proj.weight"] = (kv_rows, hidden)
        shapes[layer + "self_attn.q_norm.weight"] = (config.head_dim,)
        shapes[layer + "self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[layer + "self_attn.o_proj.weight"] = (hidden, q_rows)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        shapes[layer + "mlp.gate_proj.weight"] = (inner, hidden)
        shapes[layer + "mlp.up_proj.weight"] = (inner, hidden)
        shapes[layer + "mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if config.heads is not None:
        guard = config.heads.inner_size
        for prefix, risks, categories in (
            ("", config.heads.response_risks, config.heads.response_categories),
            ("query_", config.heads.query_risks, config.heads.query_categories),
        ):
            shapes[f"{prefix}risk_level_category_pre.weight"] = (guard, hidden)
            shapes[f"{prefix}risk_level_category_layernorm.weight"] = (guard,)
            shapes[f"{prefix}risk_level_head.weight"] = (len(risks), guard)
            shapes[f"{prefix}category_head.weight"] = (len(categories), guard)
    elif not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def num_weights(config: ModelConfig) -> int:
    """How many numbers `load_weights` keeps in memory."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def load_weights(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantization: str | None = None,
    progress: bool = False,
) -> Weights:
    """Copy the tensors of an open checkpoint into their final form. Peak memory is the result and at most one more
    tensor.

    Args:
        checkpoint: An open checkpoint, whose tensors are float32, float16 or bfloat16.
        dtype: The dtype of the result, one of these three.
        device: The device of the result.
        quantization: Round the layers' matrices to int8 by this scheme, or None.
        progress: Show a progress bar.

    Raises:
        CheckpointError: A tensor is missing, unknown, or has another shape or dtype; found before anything is copied.
        ConfigError: Another `dtype`.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(f"dtype={dtype}: choose float32, bfloat16 or float16")
    config = checkpoint.config
    check_tensors(checkpoint)
    shapes = tensor_shapes(config)

    def fused(*names: str) -> Tensor:
        rows = sum(shapes[name][0] for name in names)
        target = torch.empty((rows, *shapes[names[0]][1:]), dtype=dtype, device=device)
        start = 0
        for name in names:
            stop = start + shapes[name][0]
            target[start:stop].copy_(checkpoint.tensor(name, shapes[name]))
            start = stop
        return target

    def matrix(*names: str) -> Matrix:
        whole = fused(*names)
        return whole if quantization is None else quantize_weight(whole, quantization)

    def layer_weights(index: int) -> LayerWeights:
        layer = f"model.layers.{index}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        return LayerWeights(
            input_norm=fused(layer + "input_layernorm.weight"),
            qkv=matrix(*(f"{attention}{part}_proj.weight" for part in "qkv")),
            q_norm=fused(attention + "q_norm.weight"),
            k_norm=fused(attention + "k_norm.weight"),
            o=matrix(attention + "o_proj.weight"),
            post_norm=fused(layer + "post_attention_layernorm.weight"),
            gate_up=matrix(mlp + "gate_proj.weight", mlp + "up_proj.weight"),
            down=matrix(mlp + "down_proj.weight"),
        )

    embed = fused("model.embed_tokens.weight")
    indices = tqdm(range(config.num_layers), desc="loading layers", unit="layer", disable=not progress)
    layers = tuple(layer_weights(index) for index in indices)
    heads = lm_head = None
    if config.heads is not None:
        sides = ("", "query_")
        heads = HeadWeights(
            pre=fused(*(f"{side}risk_level_category_pre.weight" for side in sides)),
            norm=fused(*(f"{side}risk_level_category_layernorm.weight" for side in sides)).view(2, -1),
            response=fused("risk_level_head.weight", "category_head.weight"),
            query=fused("query_risk_level_head.weight", "query_category_head.weight"),
        )
    else:
        lm_head = embed if config.tie_word_embeddings else fused("lm_head.weight")
    return Weights(embed, layers, fused("model.norm.weight"), heads, lm_head, quantization)


def check_tensors(checkpoint: Checkpoint) -> None:
    """Compare the stored tensors with the config. Raises CheckpointError for one that is missing, unknown, or has
    another shape or dtype."""
    config, path = checkpoint.config, checkpoint.path
    shapes = tensor_shapes(config)
    stored = checkpoint.tensor_names
    layers = {int(match[1]) for name in stored if (match := _LAYER.match(name))}
    if layers and max(layers) >= config.num_layers:
        raise CheckpointError(
            f"{path}: tensors of layer {max(layers)} are stored, but config.json says num_hidden_layers="
            f"{config.num_layers}; take config.json and the weights from one and the same checkpoint"
        )
    known = set(stored)
    missing = [name for name in shapes if name not in known]
    if missing:
        quantized = any(name.endswith((".qweight", ".weight_scale", ".scales", ".absmax")) for name in stored)
        mend = (
            "the file has quantized weights, which cannot be read: use the published bfloat16 checkpoint"
            if quantized
            else "the checkpoint is incomplete or of another model: download it again"
        )
        raise CheckpointError(f"{path}: {len(missing)} tensor(s) missing: {_listed(missing)}; {mend}")
    unknown = [name for name in stored if name not in shapes and not _is_harmless(name)]
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} tensor(s) that no {config.kind} checkpoint has: {_listed(unknown)}; "
            "check `architectures` in config.json, or take out what was added to the file"
        )
    for name, shape in shapes.items():
        try:
            checkpoint.tensor(name, shape)
        except CheckpointError as error:
            if checkpoint.entry(name).shape == shape:
                raise
            keys = _SIZED_BY.get(name.split(".")[-2], "hidden_size")
            raise CheckpointError(f"{error} (config.json keys: {keys})") from None


def _is_harmless(name: str) -> bool:
    # The head of a language model beside guard heads or a tied embedding, and rotary buffers of old exports.
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


def _listed(names: list[str]) -> str:
    shown = ", ".join(shorten(name) for name in names[:_NUM_NAMES_SHOWN])
    rest = len(names) - _NUM_NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
