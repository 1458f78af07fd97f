"""Runner: owns the weights and the KV cache on one device and runs batches. Knows no streams.

TorchRunner calls a backend's operators one by one; guardengine.cpu_runner has the native one.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from guardengine.batch import Batch
from guardengine.config import ModelConfig
from guardengine.errors import CheckpointError
from guardengine.model import forward, guard_logits
from guardengine.weights import Weights


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Size and dtype of a paged KV cache: `num_blocks` blocks of `block_size` tokens."""

    num_blocks: int
    block_size: int
    dtype: torch.dtype

    def num_bytes(self, config: ModelConfig) -> int:
        """Bytes over all layers, keys and values; an int8 cache has a float32 scale for each token and head."""
        head = config.head_dim * self.dtype.itemsize + (4 if self.dtype == torch.int8 else 0)
        return self.num_blocks * self.block_size * 2 * config.num_layers * config.num_kv_heads * head


class Runner(Protocol):
    """What the engine runs batches on."""

    ops: ModuleType
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    kv_cache: Tensor
    kv_scales: Tensor | None  # of an int8 kv_cache
    quantization: str | None  # of the layers' matrices

    @property
    def isa(self) -> str | None:
        """The instruction set of native kernels."""

    @property
    def num_threads(self) -> int:
        """Threads that a batch runs on."""

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Compute one batch.  Returns the logits of its wanted rows, [W, C], in the order of `label_index`."""

    def copy_block(self, source: int, destination: int) -> None:
        """Copy one block's keys and values in every layer."""

    def close(self) -> None:
        """Free the weights and the KV cache; nothing can run afterwards."""


class TorchRunner:
    """Executes the model over a paged KV cache, one of `ops`' operators after the other."""

    def __init__(
        self, ops: ModuleType, config: ModelConfig, weights: Weights, cache: CacheShape, max_model_len: int
    ) -> None:
        if weights.heads is None:
            raise CheckpointError("the checkpoint has no guard heads; use a Qwen3Guard-Stream checkpoint")
        self.ops, self.config, self.weights, self.heads = ops, config, weights, weights.heads
        self.quantization = weights.quantization
        self.device, self.dtype = weights.embed.device, weights.embed.dtype
        # Never read before written, so left unset: pages of blocks that are never used cost no memory.
        self.kv_cache = torch.empty(
            (config.num_layers, 2, cache.num_blocks, cache.block_size, config.num_kv_heads, config.head_dim),
            dtype=cache.dtype,
            device=self.device,
        )
        self.kv_scales = (
            torch.empty(
                (config.num_layers, 2, cache.num_blocks, config.num_kv_heads, cache.block_size),
                dtype=torch.float32,
                device=self.device,
            )
            if cache.dtype == torch.int8
            else None
        )
        self.cos_sin = ops.rope_table(config.head_dim, config.rope_theta, max_model_len).to(self.device)

    @property
    def isa(self) -> str | None:
        return None

    @property
    def num_threads(self) -> int:
        return torch.get_num_threads()

    @torch.inference_mode()
    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Compute one batch.  Returns the logits of its wanted rows, [W, C], in the order of `label_index`."""
        weights = self.weights
        hidden = forward(self.ops, self.config, weights, self.cos_sin, self.kv_cache, self.kv_scales, batch)
        return guard_logits(self.ops, self.config, self.heads, weights.norm, hidden).cpu().numpy()

    @torch.inference_mode()
    def copy_block(self, source: int, destination: int) -> None:
        """Copy one block's keys and values in every layer."""
        self.kv_cache[:, :, destination] = self.kv_cache[:, :, source]
        if self.kv_scales is not None:
            self.kv_scales[:, :, destination] = self.kv_scales[:, :, source]

    def close(self) -> None:
        """Free the weights and the KV cache; nothing can run afterwards."""
        del self.weights, self.heads, self.kv_cache, self.kv_scales
