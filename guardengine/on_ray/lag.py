"""LagPolicy: how many replicas Ray Serve should run, by how far their engines lag. Imports nothing of guardengine: Ray
carries this file to its controller."""

from __future__ import annotations

import math
from typing import Any

LAG = "lag_s"  # what a replica reports: `lag_s` of AsyncEngine.stats()
_FASTEST = 2.0  # times as many replicas at a time
_IDLE = 0.25  # of the target: one replica fewer when no engine lags more


class LagPolicy:
    """Ray calls it every so often, with every replica's lag over its look-back period, and waits for its own delays
    before it follows.

    More replicas where the mean of the lags is above the target, in proportion; one fewer where the worst is below a
    quarter of it; else as many as are wanted already. A lag is no measure of load below the target, as a step takes
    more streams in about the same time: so there is a band in which nothing happens.
    """

    def __init__(self, target_lag_s: float) -> None:
        self._target_lag_s = target_lag_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """context: ray.serve.config.AutoscalingContext."""
        lags = list((context.aggregated_metrics or {}).get(LAG, {}).values())
        wanted: int = context.target_num_replicas
        if lags:
            excess = sum(lags) / len(lags) / self._target_lag_s
            if excess > 1:
                wanted = max(wanted, math.ceil(context.current_num_replicas * min(excess, _FASTEST)))
            elif max(lags) < _IDLE * self._target_lag_s:
                wanted -= 1
        return wanted, {}
