"""Scale: how many replicas, and what each takes of its node."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from guardengine.errors import ConfigError

_RANGE = re.compile(r"([0-9]{1,6})(?:\.\.([0-9]{1,6}))?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """From `least` to `most` replicas. num_cpus are the engine's threads too. Raises ConfigError for what cannot be."""

    least: int = 1
    most: int = 1
    num_cpus: int = 1
    num_gpus: float = 0
    target_lag_ms: float = 500.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(
                f"--replicas {self.least}..{self.most}: MIN..MAX is needed, from 1, MAX no less than MIN"
            )
        if self.num_cpus < 1:
            raise ConfigError(f"--cpus {self.num_cpus}: a number from 1 is needed")
        # Ray gives shares of one GPU, or whole ones.
        if not 0 <= self.num_gpus < math.inf or (self.num_gpus > 1 and self.num_gpus % 1):
            raise ConfigError(f"--gpus {self.num_gpus:g}: a share below 1, or a whole number, is needed")
        if not 0 < self.target_lag_ms < math.inf:
            raise ConfigError(f"--target-lag-ms {self.target_lag_ms:g}: a number above 0 is needed")
        for name in ("upscale_delay_s", "downscale_delay_s"):
            if not 0 <= getattr(self, name) < math.inf:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{option} {getattr(self, name):g}: a number of seconds from 0 is needed")


def read_range(text: str) -> tuple[int, int]:
    """`MIN..MAX`, or one number for both. Raises ConfigError."""
    found = _RANGE.fullmatch(text)
    if found is None:
        raise ConfigError(f"--replicas {text!r:.80}: MIN..MAX is needed, such as 2..8, or a number")
    return int(found[1]), int(found[2] or found[1])
