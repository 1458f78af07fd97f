"""Runner: owns the weights and the KV cache on one device and runs batches. Knows no streams.

torch_runner calls a backend's operators one by one; cpu_runner and gpu_runner run steps of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from guardengine.checkpoint.model_config import ModelConfig
from guardengine.runners.batch import Batch
from guardengine.runners.lm_head import LmHead


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
