"""The least time that this machine could take for a step: what must be read over what it can read a second, or
what must be computed over what it can compute, whichever is longer.

Counts only work that no implementation can leave out: every weight once a step, every cached key and value of
the streams in it once, and the multiplications of the rows that are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from guardengine.checkpoint.model_config import ModelConfig
from guardengine.labels import Label


class Work(NamedTuple):
    num_bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """Counts bytes and operations of one model. Scales are left out: a floor stays a floor."""

    config: ModelConfig
    weight_bytes: int  # a value of the layers' matrices
    kv_bytes: int  # a value

    @property
    def num_weights(self) -> int:
        """All weights, the embedding's included."""
        config = self.config
        return config.vocab_size * config.hidden_size + self._matrices * config.num_layers + self._classifiers

    @property
    def kv_bytes_per_token(self) -> int:
        config = self.config
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.kv_bytes

    def of_tokens(self, positions: Sequence[Sequence[int]], num_wanted: int | None = None) -> Work:
        """One step over the tokens at `positions` of each stream in it, `num_wanted` of them labelled (None: all).

        Past its keys and values the last layer is needed for labelled tokens only.
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
        """The weights of one layer's matrices."""
        config = self.config
        width = config.num_heads * config.head_dim
        return self._qkv + config.hidden_size * (width + 3 * config.intermediate_size)

    @property
    def _classifiers(self) -> int:
        heads = self.config.heads
        return heads.inner_size * (2 * self.config.hidden_size + heads.num_logits) if heads else 0

    def of_labels(self, labels: Iterable[Label]) -> Work:
        """The step that computed just these labels."""
        positions: dict[str, list[int]] = {}
        for label in labels:
            positions.setdefault(label.stream_id, []).append(label.position)
        return self.of_tokens(list(positions.values()))

    def of_prompts(self, num_streams: int, prompt_len: int, num_steps: int) -> Work:
        """Prompts of equal length in `num_steps` steps, one label each; every step reads the weights."""
        once = self.of_tokens([range(prompt_len)] * num_streams, num_wanted=num_streams)
        no_tokens = self.of_tokens([])
        return Work(once.num_bytes + (num_steps - 1) * no_tokens.num_bytes, once.flops)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine showed it can do, in the dtype at hand, right beside a measurement."""

    read_bytes_per_s: float
    flops_per_s: float

    @staticmethod
    def best_of(probes: Sequence[Any], dtype: str, quantization: str | None = None) -> Limits:
        """The best that any of the probes (`guardengine.measuring.machine.Ceilings`) reached with the instructions that
        the dtype, or w8a8, could use."""
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
        """The floor and what sets it: "bandwidth" or "compute"."""
        reading, computing = work.num_bytes / self.read_bytes_per_s, work.flops / self.flops_per_s
        return max(reading, computing), "bandwidth" if reading >= computing else "compute"
