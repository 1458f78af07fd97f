"""Scale: the number of replicas, and the resources of each."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from guardengine.errors import ConfigError

_RANGE = re.compile(r"([0-9]{1,6})(?:\.\.([0-9]{1,6}))?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The replicas of a deployment.

    Attributes:
        least: Smallest number of replicas.
        most: Largest number of replicas.
        num_cpus: CPUs, and threads, of each replica.
        num_gpus: GPUs of each replica, a share below 1 or a whole number.
        target_lag_ms: More replicas are started when the mean lag is longer, in milliseconds.
        upscale_delay_s: How long that must last, in seconds.
        downscale_delay_s: How long the lag must be short before a replica is stopped, in seconds.

    Raises:
        ConfigError: A value is out of range.
    """

    least: int = 1
    most: int = 1
    num_cpus: int = 1
    num_gpus: float = 0
    target_lag_ms: float = 500.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(f"--replicas {self.least}..{self.most}: give MIN..MAX with 1 <= MIN <= MAX")
        if self.num_cpus < 1:
            raise ConfigError(f"--cpus {self.num_cpus}: give a number from 1")
        # Ray gives shares of one GPU, or whole ones.
        if not 0 <= self.num_gpus < math.inf or (self.num_gpus > 1 and self.num_gpus % 1):
            raise ConfigError(f"--gpus {self.num_gpus:g}: give a share below 1, or a whole number")
        if not 0 < self.target_lag_ms < math.inf:
            raise ConfigError(f"--target-lag-ms {self.target_lag_ms:g}: give a number above 0")
        for name in ("upscale_delay_s", "downscale_delay_s"):
            if not 0 <= getattr(self, name) < math.inf:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} {getattr(self, name):g}: give a number of seconds from 0")


def read_range(text: str) -> tuple[int, int]:
    """Parse `MIN..MAX`, or one number for both. Raises ConfigError."""
    found = _RANGE.fullmatch(text)
    if found is None:
        raise ConfigError(f"--replicas {text!r:.80}: give MIN..MAX, such as 2..8, or a number")
    return int(found[1]), int(found[2] or found[1])
