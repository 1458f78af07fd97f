"""KVCache: keys and values of every layer, in blocks, and the two orders in which they lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from guardengine.checkpoint.model_config import ModelConfig


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


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer. A runner chooses one of two layouts, by `block_axis`:

    - 2, layers first, of TorchRunner and GpuRunner: `values` [layers, 2, N, S, Hkv, D], `scales` [layers, 2, N, Hkv,
      S]. An operator is given one layer's keys and its values, each of them contiguous.
    - 0, blocks first, of CpuRunner: `values` [N, layers, 2, Hkv, S, D], `scales` [N, layers, 2, Hkv, S]. A block is
      contiguous over all layers; where S is a multiple of 16 a head's S * D values lie as the kernels multiply them
      (HeadShape::is_tiled in csrc/kernels.h).

    The axis of 2 is keys, then values. Letters are those of guardengine.kernels.
    """

    values: Tensor  # float32, bfloat16, float16 or int8
    scales: Tensor | None  # float32, one a token and head; of an int8 cache only
    block_axis: int

    @staticmethod
    def layers_first(
        shape: CacheShape, config: ModelConfig, empty: Callable[[tuple[int, ...], torch.dtype], Tensor]
    ) -> KVCache:
        """Allocate a cache for operators.

        Args:
            shape: Its blocks and dtype.
            config: The model's sizes.
            empty: Makes a tensor of a shape and dtype on the device. It need not be initialized: nothing is read before
                it was written. (On a CPU, pages of blocks that are never used cost no memory then.)
        """
        blocks, heads = (config.num_layers, 2, shape.num_blocks), config.num_kv_heads
        values = empty((*blocks, shape.block_size, heads, config.head_dim), shape.dtype)
        scales = None
        if shape.dtype == torch.int8:
            scales = empty((*blocks, heads, shape.block_size), torch.float32)
        return KVCache(values, scales, block_axis=2)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def block_size(self) -> int:
        """Tokens of a block, S."""
        return self.values.shape[3 if self.block_axis == 2 else 4]

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """One layer's keys, values and their scales, of a cache that has its layers first.

        Returns:
            keys [N, S, Hkv, D], values [N, S, Hkv, D], scales of both [N, Hkv, S] or None: views, to be written to.
        """
        keys, values = self.values[index]
        key_scales, value_scales = (None, None) if self.scales is None else self.scales[index]
        return keys, values, key_scales, value_scales

    def copy_block(self, source: int, destination: int) -> None:
        """Copy one block's keys and values in every layer."""
        for tensor in (self.values, self.scales):
            if tensor is not None:
                tensor.select(self.block_axis, destination).copy_(tensor.select(self.block_axis, source))
