"""A Qwen3ForCausalLM checkpoint as GGUF, for llama.cpp: straight from safetensors, without a tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from guardengine.checkpoint.files import open_checkpoint
from guardengine.checkpoint.model_config import ModelConfig
from guardengine.checkpoint.weights import tensor_shapes

TYPES = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
_FILE_TYPES = {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}


def write_gguf(folder: Path, target: Path, weights: str) -> Path:
    """Write `target` with matrices as `weights` ("bf16" or "q8_0") and norms in float32, unless it is there."""
    if target.is_file():
        return target
    part = target.with_name(f".{target.name}.{os.getpid()}")
    with open_checkpoint(folder) as checkpoint:
        config, shapes = checkpoint.config, tensor_shapes(checkpoint.config)
        writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3])
        _add_header(writer, config, weights)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_layers)
        for name in checkpoint.tensor_names:
            gguf_name = names.get_name(name, try_suffixes=(".weight",))
            if gguf_name is None:
                raise ValueError(f"{folder}: GGUF has no name for tensor {name}")
            _add_tensor(writer, gguf_name, checkpoint.tensor(name, shapes[name]), weights)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    part.rename(target)
    return target


def _add_header(writer: gguf.GGUFWriter, config: ModelConfig, weights: str) -> None:
    writer.add_file_type(_FILE_TYPES[weights])
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")  # token ids in, logits out


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, weights: str) -> None:
    values = tensor.float().numpy()
    if tensor.dim() == 1:
        writer.add_tensor(name, values)
        return
    packed = gguf.quants.quantize(values, TYPES[weights])
    writer.add_tensor(name, np.ascontiguousarray(packed), raw_dtype=TYPES[weights])
