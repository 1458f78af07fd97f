"""Scratch memory that fused operators share: sums that are not whole yet, counters of programs that have arrived.

Whoever launches operators one after another owns one workspace for all of them. It is allocated once, so that
captured graphs find it where it was; counters are zero between launches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from guardengine.kernels import SMALL_ROWS
from guardengine.kernels.gpu.linear_config import LinearConfig, num_columns

Key = tuple[str, tuple[int, int]]  # an operator of guardengine.kernels.gpu.linear, and its weight's shape


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """Memory for launches that follow each other, and how each weight is multiplied."""

    partials: Tensor  # float32
    counters: Tensor  # int32, zeros
    configs: Mapping[Key, LinearConfig]

    def config(self, operator: str, weight: Tensor) -> LinearConfig:
        """The weight's configuration.  Raises ValueError where the workspace was allocated without it."""
        shape = (weight.shape[0], weight.shape[1])
        try:
            return self.configs[operator, shape]
        except KeyError:
            raise ValueError(
                f"{operator} of a weight {shape}: the workspace was allocated without it"
            ) from None

    def take(self, num_partials: int, num_counters: int) -> tuple[Tensor, Tensor]:
        """The memory, for one launch.  Raises ValueError where it needs more than was allocated."""
        if num_partials > self.partials.numel() or num_counters > self.counters.numel():
            raise ValueError(
                f"{num_partials} partial sums and {num_counters} counters do not fit a workspace for "
                f"{self.partials.numel()} and {self.counters.numel()}: allocate it for as many rows"
            )
        return self.partials, self.counters


def allocate_workspace(
    configs: Mapping[Key, LinearConfig],
    device: torch.device | str,
    *,
    max_rows: int = SMALL_ROWS,
    others: Iterable[tuple[int, int]] = (),
) -> Workspace:
    """Allocate what any one launch needs.

    Args:
        configs: How each weight is multiplied, by operator and shape.
        device: Where to.
        max_rows: Rows of a launch at most.
        others: The needs of other operators, as (partial sums, counters): `guard_scores_scratch`.
    """
    needs = [
        config.scratch(operator, num_columns(operator, shape), max_rows)
        for (operator, shape), config in configs.items()
    ]
    needs += [(1, 1), *others]
    return Workspace(
        partials=torch.empty(max(need[0] for need in needs), dtype=torch.float32, device=device),
        counters=torch.zeros(max(need[1] for need in needs), dtype=torch.int32, device=device),
        configs=dict(configs),
    )
