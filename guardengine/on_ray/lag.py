"""LagPolicy: the number of replicas for Ray Serve, from the lag of their engines. Imports nothing of guardengine,
because Ray copies this file to its controller."""

from __future__ import annotations

import math
from typing import Any

LAG = "lag_s"  # the name of what a replica reports, `lag_s` of AsyncEngine.stats()
_FASTEST = 2.0  # largest factor by which the number of replicas grows at a time
_IDLE = 0.25  # share of the target below which a replica is removed


class LagPolicy:
    """Ray calls it periodically with the lag of every replica over its look-back period, and waits for its own delays
    before it acts.

    With mean lag m, worst lag w and target t: n * min(m / t, 2) replicas, rounded up, when m > t and there are n; one
    replica fewer when w < t / 4; else no change. Below the target, lag says little about load, because a step takes
    more streams in about the same time; hence the wide band without change.
    """

    def __init__(self, target_lag_s: float) -> None:
        self._target_lag_s = target_lag_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas.

        Args:
            context: A ray.serve.config.AutoscalingContext.

        Returns:
            The number, and {} as the state that Ray keeps.
        """
        lags = list((context.aggregated_metrics or {}).get(LAG, {}).values())
        num_replicas: int = context.target_num_replicas
        if lags:
            excess = sum(lags) / len(lags) / self._target_lag_s
            if excess > 1:
                num_replicas = max(
                    num_replicas, math.ceil(context.current_num_replicas * min(excess, _FASTEST))
                )
            elif max(lags) < _IDLE * self._target_lag_s:
                num_replicas -= 1
        return num_replicas, {}
