"""Runner: owns the weights and the KV cache on one device and runs batches. Knows no streams.

TorchRunner calls a backend's operators one by one; guardengine.runners.cpu_runner has the native one.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from guardengine.checkpoint.weights import Weights
from guardengine.config import ModelConfig
from guardengine.runners.batch import Batch
from guardengine.runners.lm_head import LmHead, plain_product
from guardengine.runners.model import final_rows, forward, guard_logits


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


class Scores(NamedTuple):
    """What a batch's wanted rows came to, in the order of `label_index`.  Shapes: [W, C].

    Without guard heads `logits` are the rows that the language model's head is multiplied with, [W, E].
    """

    logits: npt.NDArray[np.float32]
    probs: npt.NDArray[np.float32] | None = (
        None  # softmax of each classifier's logits, where the device did it
    )


class Launched(Protocol):
    """A batch that may still be running."""

    def wait(self) -> Scores:
        """Its scores, once it is done. Raises what went wrong; nothing was computed then."""


class Computed(NamedTuple):
    """A batch that is done."""

    scores: Scores

    def wait(self) -> Scores:
        return self.scores


class Runner(Protocol):
    """What the engine runs batches on. Batches run one after another, in the order of launch."""

    max_in_flight: int  # batches worth launching before the first is waited for

    ops: ModuleType
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    kv_cache: Tensor
    kv_scales: Tensor | None  # of an int8 kv_cache
    quantization: str | None  # of the layers' matrices
    lm_head: LmHead | None  # of a Gen checkpoint

    @property
    def isa(self) -> str | None:
        """The instruction set of native kernels."""

    @property
    def num_threads(self) -> int:
        """Threads that a batch runs on."""

    def launch(self, batch: Batch) -> Launched:
        """Start computing one batch. When this raises, nothing was computed."""

    def copy_block(self, source: int, destination: int) -> None:
        """Copy one block's keys and values in every layer."""

    def close(self) -> None:
        """Free the weights and the KV cache; nothing can run afterwards."""


class TorchRunner:
    """Executes the model over a paged KV cache, one of `ops`' operators after the other."""

    max_in_flight = 1

    def __init__(
        self, ops: ModuleType, config: ModelConfig, weights: Weights, cache: CacheShape, max_model_len: int
    ) -> None:
        self.ops, self.config, self.weights = ops, config, weights
        head = weights.lm_head
        self.lm_head = None if head is None else LmHead(head, plain_product(head))
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
    def launch(self, batch: Batch) -> Computed:
        """Compute one batch."""
        weights, batch = self.weights, batch.to(self.device)
        hidden = forward(self.ops, self.config, weights, self.cos_sin, self.kv_cache, self.kv_scales, batch)
        if weights.heads is None:
            out = final_rows(self.ops, self.config, weights.norm, hidden)
        else:
            out = guard_logits(self.ops, self.config, weights.heads, weights.norm, hidden)
        return Computed(Scores(out.cpu().numpy()))

    @torch.inference_mode()
    def copy_block(self, source: int, destination: int) -> None:
        """Copy one block's keys and values in every layer."""
        self.kv_cache[:, :, destination] = self.kv_cache[:, :, source]
        if self.kv_scales is not None:
            self.kv_scales[:, :, destination] = self.kv_scales[:, :, source]

    def close(self) -> None:
        """Free the weights and the KV cache; nothing can run afterwards."""
        self.lm_head = None
        del self.weights, self.kv_cache, self.kv_scales
