"""TorchRunner: runs batches as one call of a backend's operators after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from guardengine.checkpoint.model_config import ModelConfig
from guardengine.checkpoint.weights import Weights
from guardengine.kernels import backend_of
from guardengine.runners.batch import Batch
from guardengine.runners.kv_cache import CacheShape, KVCache
from guardengine.runners.lm_head import LmHead, plain_product
from guardengine.runners.model import DeviceModel, final_rows, forward, guard_logits
from guardengine.runners.operators import Operators
from guardengine.runners.runner import Computed, RunnerInfo, Scores


class TorchRunner:
    """Executes the model over a paged KV cache, one of `ops`' operators after the other.

    Args:
        ops: A backend.
        config: The model's sizes.
        weights: On the device to run on.
        cache: Size and dtype of the KV cache to allocate there.
        max_model_len: Tokens of a stream at most.
    """

    max_in_flight = 1

    def __init__(
        self, ops: Operators, config: ModelConfig, weights: Weights, cache: CacheShape, max_model_len: int
    ) -> None:
        head, device = weights.lm_head, weights.embed.device
        self.lm_head = None if head is None else LmHead(head, plain_product(head))

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.kv_cache = KVCache.layers_first(cache, config, empty)
        cos_sin = ops.rope_table(config.head_dim, config.rope_theta, max_model_len).to(device)
        self.weights = weights
        self._model = DeviceModel(ops, config, weights, cos_sin, self.kv_cache)
        self._backend = backend_of(ops)
        self._about = (config, device, weights.embed.dtype, weights.quantization)

    @property
    def info(self) -> RunnerInfo:
        """What it is and runs on; as many threads as torch has now."""
        return RunnerInfo(self._backend, *self._about, isa=None, num_threads=torch.get_num_threads())

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Computed:
        """Compute one batch."""
        model = self._model
        hidden = forward(model, batch.to(model.weights.embed.device))
        out = final_rows(model, hidden) if model.weights.heads is None else guard_logits(model, hidden)
        return Computed(Scores(out.cpu().numpy()))

    @torch.inference_mode()
    def copy_block(self, source: int, destination: int) -> None:
        """Copy one block's keys and values in every layer."""
        self.kv_cache.copy_block(source, destination)

    def close(self) -> None:
        """Free the weights and the KV cache; nothing can run afterwards."""
        self.lm_head = None
        del self._model, self.weights, self.kv_cache
