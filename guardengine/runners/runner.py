"""Runner: owns the weights and the KV cache on one device and runs batches. Knows no streams.

torch_runner calls a backend's operators one by one; cpu_runner and gpu_runner run steps of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from guardengine.checkpoint.model_config import ModelConfig
from guardengine.runners.batch import Batch
from guardengine.runners.kv_cache import KVCache
from guardengine.runners.lm_head import LmHead


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """What a runner says of itself. Constant for as long as it lives, but for torch's number of threads."""

    backend: str  # one of guardengine.kernels.BACKENDS
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype  # of the weights
    quantization: str | None  # of the layers' matrices
    isa: str | None  # the instruction set of native kernels, "avx512", "sm_90"; None for plain PyTorch
    num_threads: int  # that a batch runs on


class Scores(NamedTuple):
    """What a batch's wanted rows came to, in the order of `label_index`.  Shapes: [W, C].

    Without guard heads `logits` are the rows that the language model's head is multiplied with, [W, E].
    """

    logits: npt.NDArray[np.float32]
    # Softmax of each classifier's logits, where the device computed it.
    probs: npt.NDArray[np.float32] | None = None


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

    kv_cache: KVCache
    lm_head: LmHead | None  # of a Gen checkpoint

    @property
    def info(self) -> RunnerInfo:
        """What it is and runs on."""

    def launch(self, batch: Batch) -> Launched:
        """Start computing one batch.

        Args:
            batch: In the host's memory; not changed, and not read any more once this returns.

        Returns:
            What to wait for. When this raises, nothing was computed.
        """

    def copy_block(self, source: int, destination: int) -> None:
        """Copy one block's keys and values in every layer."""

    def close(self) -> None:
        """Free the weights and the KV cache; nothing can run afterwards."""
