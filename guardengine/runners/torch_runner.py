"""TorchRunner: runs batches as one call of a backend's operators after the other."""

from __future__ import annotations

from types import ModuleType

import torch

from guardengine.checkpoint.model_config import ModelConfig
from guardengine.checkpoint.weights import Weights
from guardengine.runners.batch import Batch
from guardengine.runners.lm_head import LmHead, plain_product
from guardengine.runners.model import final_rows, forward, guard_logits
from guardengine.runners.runner import CacheShape, Computed, Scores


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
