"""What a benchmark feeds: prompts, responses and when their tokens arrive. Knows no engine and no clock.

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
    """One measured setting: how many streams, how long, fed how.

    lockstep: every stream gets its next k tokens as soon as all have their labels (closed loop).
    poisson: each stream gets k tokens at a time, `rate` tokens a second on average, whatever the engine does
    (open loop).
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
                raise ConfigError(f"{name}={value}: a whole number from 1 to {2**20} is needed")
        if self.arrival not in ("lockstep", "poisson"):
            raise ConfigError(f"arrival={self.arrival!r}: 'lockstep' or 'poisson' is needed")
        if not 1e-3 <= self.rate <= 1e6:
            raise ConfigError(f"rate={self.rate}: from 0.001 to 1000000 tokens a second is needed")


class Arrival(NamedTuple):
    """Tokens first .. first + num_tokens - 1 of stream `stream`'s response, due `due_s` after the start."""

    due_s: float
    stream: int
    first: int
    num_tokens: int


def poisson_arrivals(point: Point, seed: int) -> list[Arrival]:
    """A Poisson process for each stream, all merged in order of time."""
    rng = np.random.default_rng([seed, point.num_streams, point.response_len, point.k])
    arrivals = []
    for stream in range(point.num_streams):
        due_s = 0.0
        for first in range(0, point.response_len, point.k):
            count = min(point.k, point.response_len - first)
            due_s += float(rng.exponential(count / point.rate))
            arrivals.append(Arrival(due_s, stream, first, count))
    return sorted(arrivals)
