"""What the triton backend cannot run, said before anything is loaded: shapes, dtypes, memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from guardengine.checkpoint.model_config import ModelConfig
from guardengine.checkpoint.weights import num_weights
from guardengine.config import EngineConfig
from guardengine.errors import ConfigError
from guardengine.kernels import SMALL_ROWS
from guardengine.runners import accelerator
from guardengine.runners.accelerator import Accelerator
from guardengine.runners.operators import Operators
from guardengine.runners.step_inputs import MAX_ROWS

_HEAD_DIMS = (16, 32, 64, 128, 256)
_MAX_WIDTH = 16384  # of a row that one program norms
_MAX_GROUP = 32  # query heads of one key head: rows of one tile


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a GPU: what is free now, and what is not for the KV cache."""

    device: torch.device
    free: int
    weights: int
    working: int  # scratch, the largest step's intermediate results, the CUDA context's own

    @staticmethod
    def of(
        device: torch.device,
        options: EngineConfig,
        config: ModelConfig,
        dtype: torch.dtype,
        max_model_len: int,
    ) -> DeviceMemory:
        """Ask the GPU and the model."""
        working = working_bytes(config, dtype, options.max_num_batched_tokens, max_model_len)
        return DeviceMemory(
            device,
            accelerator.free_bytes(device),
            num_weights(config) * dtype.itemsize,
            working + accelerator.CUDA_OVERHEAD_BYTES,
        )

    @property
    def left(self) -> int:
        """For the KV cache."""
        return max(0, self.free - self.weights - self.working)

    def check(self, cache_bytes: int) -> None:
        """Raise ConfigError where it is too little."""
        if self.weights + self.working + cache_bytes > self.free:
            raise ConfigError(
                f"device='{self.device}': {_gib(self.free)} GiB are free; needed are {_gib(self.weights)} for the "
                f"weights, {_gib(cache_bytes)} for the KV cache and {_gib(self.working)} to work with. Lower "
                "kv_cache_bytes, take a smaller checkpoint, or free memory (nvidia-smi lists who holds it)"
            )


def check_shapes(config: ModelConfig, options: EngineConfig) -> None:
    """Raise ConfigError for a model, or a step, that the kernels do not take."""
    if options.max_num_batched_tokens > MAX_ROWS:
        raise ConfigError(
            f"max_num_batched_tokens={options.max_num_batched_tokens}: the triton backend captures steps of up to "
            f"{MAX_ROWS} tokens; more make no step faster"
        )
    mend = "use backend='reference' or backend='cpu'"
    if config.head_dim not in _HEAD_DIMS:
        raise ConfigError(
            f"head_dim={config.head_dim}: the triton backend needs one of {', '.join(map(str, _HEAD_DIMS))}; {mend}"
        )
    if config.hidden_size > _MAX_WIDTH:
        raise ConfigError(
            f"hidden_size={config.hidden_size}: the triton backend takes {_MAX_WIDTH} at most; {mend}"
        )
    group = config.num_heads // config.num_kv_heads
    if group > _MAX_GROUP:
        raise ConfigError(
            f"num_attention_heads / num_key_value_heads is {group}: the triton backend takes {_MAX_GROUP} at most; "
            f"{mend}"
        )


def check_bfloat16(ops: Operators, dtype: torch.dtype, target: Accelerator) -> None:
    """Raise ConfigError where bfloat16 is asked of Triton's interpreter as it is released, which gets it wrong."""
    if dtype != torch.bfloat16 or target.device.type != "cpu":
        return
    x = torch.tensor([[1.5, -2.0, 0.25, 3.0] * 4], dtype=dtype)
    weight = torch.eye(16, dtype=dtype)
    if not torch.equal(ops.linear(x, weight), x):
        raise ConfigError(
            "dtype bfloat16: Triton's interpreter computes it wrongly; pass dtype='float32' to run there"
        )


def working_bytes(
    config: ModelConfig, dtype: torch.dtype, max_num_batched_tokens: int, max_model_len: int
) -> int:
    """About what steps need beside weights and KV cache, at most."""
    heads, dim, width = config.num_heads, config.head_dim, config.hidden_size
    qkv = (heads + 2 * config.num_kv_heads) * dim
    row = 4 * width + qkv + 2 * heads * dim + 3 * config.intermediate_size
    large = 2 * row * max_num_batched_tokens * dtype.itemsize  # twice: the allocator keeps freed pieces
    segments = -(-max_model_len // 256)
    attention: int = SMALL_ROWS * segments * heads * (dim + 3) * 4
    linear: int = SMALL_ROWS * 16 * max(qkv, width, 2 * config.intermediate_size) * 4
    table = max_model_len * dim * 4
    return large + attention + linear + table


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"
