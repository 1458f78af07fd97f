"""For tests of reward functions: what a trainer gives them, and what it keeps of what they log."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

COMPLETIONS = ["fine", "<think>Unsafe</think>fine", "refuse"]


class Trainer:
    """Calls reward functions as TRL's GRPOTrainer does, and keeps what they log."""

    def __init__(self) -> None:
        self.extra: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}

    def arguments(self, completions: list[Any], **columns: list[Any]) -> dict[str, Any]:
        return {
            "prompts": ["x"] * len(completions),
            "completions": completions,
            "completion_ids": [[1]] * len(completions),
            "trainer_state": SimpleNamespace(global_step=1),
            "log_extra": lambda column, values: self.extra.setdefault(column, []).extend(values),
            "log_metric": lambda name, value: self.metrics.setdefault(name, []).append(value),
            "environments": None,
            **columns,
        }
