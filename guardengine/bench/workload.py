"""The workload of a benchmark: prompts, responses, and when their tokens arrive. Knows no engine and no clock.

The same seed and point give the same ids and the same schedule on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from guardengine.errors import ConfigError

ArrivalKind = Literal["lockstep", "poisson"]


@dataclass(frozen=True, slots=True)
class Point:
    """One measured setting.

    Attributes:
        num_streams: Number of streams.
        prompt_len: Tokens of each prompt.
        response_len: Tokens of each response.
        k: Tokens in one append.
        arrival: "lockstep": every stream gets its next k tokens as soon as all streams have their labels (closed
            loop). "poisson": each stream gets k tokens at a time, `rate` tokens a second on average, however fast the
            engine is (open loop).
        rate: Tokens a second and stream, for "poisson".
    """

    num_streams: int
    prompt_len: int
    response_len: int
    k: int = 1
    arrival: ArrivalKind = "lockstep"
    rate: float = 10.0

    def __post_init__(self) -> None:
        for name in ("num_streams", "prompt_len", "response_len", "k"):
            value = getattr(self, name)
            if not 1 <= value <= 2**20:
                raise ConfigError(f"{name}={value}: pass a whole number from 1 to {2**20}")
        if self.arrival not in ("lockstep", "poisson"):
            raise ConfigError(f"arrival={self.arrival!r}: choose 'lockstep' or 'poisson'")
        if not 1e-3 <= self.rate <= 1e6:
            raise ConfigError(f"rate={self.rate}: pass 0.001 to 1000000 tokens a second")


class Arrival(NamedTuple):
    """An append: tokens first to first + num_tokens - 1 of the response of `stream`, due `due_s` seconds after the
    start."""

    due_s: float
    stream: int
    first: int
    num_tokens: int


def poisson_arrivals(point: Point, seed: int) -> list[Arrival]:
    """A Poisson process for each stream, merged in order of time."""
    rng = np.random.default_rng([seed, point.num_streams, point.response_len, point.k])
    arrivals = []
    for stream in range(point.num_streams):
        due_s = 0.0
        for first in range(0, point.response_len, point.k):
            count = min(point.k, point.response_len - first)
            due_s += float(rng.exponential(count / point.rate))
            arrivals.append(Arrival(due_s, stream, first, count))
    return sorted(arrivals)
