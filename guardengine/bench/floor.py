"""The floor of a step: the least time that this machine could take for it.

floor = max(bytes that must be read / read bandwidth, operations that must be done / arithmetic peak). Only work that
no implementation can avoid is counted: every weight once a step, every cached key and value of its streams once, and
the multiplications of the rows that are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from guardengine.checkpoint.model_config import ModelConfig
from guardengine.labels import Label


class Work(NamedTuple):
    """The least work of a step: bytes to read, and floating-point operations."""

    num_bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """Counts the least bytes and operations for one model. The scales of quantization are left out, so that it stays a
    lower bound.

    Attributes:
        config: The model.
        weight_bytes: Bytes of one value of the layers' matrices.
        kv_bytes: Bytes of one value of the KV cache.
    """

    config: ModelConfig
    weight_bytes: int
    kv_bytes: int

    @property
    def num_weights(self) -> int:
        """Number of all weights, the embedding included."""
        config = self.config
        return config.vocab_size * config.hidden_size + self._matrices * config.num_layers + self._classifiers

    @property
    def kv_bytes_per_token(self) -> int:
        config = self.config
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.kv_bytes

    def of_tokens(self, positions: Sequence[Sequence[int]], num_wanted: int | None = None) -> Work:
        """The work of one step.

        After its keys and values the last layer is needed for labelled tokens only.

        Args:
            positions: The positions of the tokens of each stream in the step.
            num_wanted: How many of the tokens get a label; None: all.
        """
        config, tokens = self.config, sum(map(len, positions))
        wanted = tokens if num_wanted is None else num_wanted
        after_kv_rows = (config.num_layers - 1) * tokens + wanted  # rows of a layer's rest, over all layers
        attended = sum(position + 1 for stream in positions for position in stream) / max(tokens, 1)
        flops = 2.0 * (self._qkv * config.num_layers * tokens + (self._matrices - self._qkv) * after_kv_rows)
        flops += 2.0 * self._classifiers * wanted
        flops += 4.0 * config.num_heads * config.head_dim * attended * after_kv_rows
        weights = self._matrices * config.num_layers + self._classifiers + config.hidden_size * tokens
        cached = sum(stream[-1] + 1 for stream in positions if stream)
        return Work(weights * self.weight_bytes + cached * self.kv_bytes_per_token, flops)

    @property
    def _qkv(self) -> int:
        config = self.config
        return config.hidden_size * config.head_dim * (config.num_heads + 2 * config.num_kv_heads)

    @property
    def _matrices(self) -> int:
        """Number of weights in the matrices of one layer."""
        config = self.config
        width = config.num_heads * config.head_dim
        return self._qkv + config.hidden_size * (width + 3 * config.intermediate_size)

    @property
    def _classifiers(self) -> int:
        heads = self.config.heads
        return heads.inner_size * (2 * self.config.hidden_size + heads.num_logits) if heads else 0

    def of_labels(self, labels: Iterable[Label]) -> Work:
        """The work of the step that computed exactly these labels."""
        positions: dict[str, list[int]] = {}
        for label in labels:
            positions.setdefault(label.stream_id, []).append(label.position)
        return self.of_tokens(list(positions.values()))

    def of_prompts(self, num_streams: int, prompt_len: int, num_steps: int) -> Work:
        """The work for prompts of equal length in `num_steps` steps, with one label each. Every step reads the
        weights."""
        once = self.of_tokens([range(prompt_len)] * num_streams, num_wanted=num_streams)
        no_tokens = self.of_tokens([])
        return Work(once.num_bytes + (num_steps - 1) * no_tokens.num_bytes, once.flops)


@dataclass(frozen=True, slots=True)
class Limits:
    """The rates that the machine reached beside a measurement, in the dtype of the measurement."""

    read_bytes_per_s: float
    flops_per_s: float

    @staticmethod
    def best_of(probes: Sequence[Any], dtype: str, quantization: str | None = None) -> Limits:
        """The best rates in any of the probes (`guardengine.measuring.machine.Ceilings`), with the instructions that
        the dtype, or w8a8, can use."""
        peaks = [
            max(
                p.fp32_flops or 0.0,
                (p.bf16_flops or 0.0) if dtype == "bfloat16" else 0.0,
                (p.int8_ops or 0.0) if quantization == "w8a8" else 0.0,
            )
            for p in probes
        ]
        return Limits(max(p.read_bytes_per_s for p in probes), max(peaks))

    def seconds(self, work: Work) -> tuple[float, str]:
        """The floor in seconds, and what determines it: "bandwidth" or "compute"."""
        reading, computing = work.num_bytes / self.read_bytes_per_s, work.flops / self.flops_per_s
        return max(reading, computing), "bandwidth" if reading >= computing else "compute"
