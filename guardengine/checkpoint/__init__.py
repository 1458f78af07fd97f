"""Checkpoints: from files to a ModelConfig and weights; and random ones for machines without real weights."""

from __future__ import annotations

from typing import Any

from guardengine._moved import moved_name


def __getattr__(name: str) -> Any:
    return moved_name(__name__, "guardengine.checkpoint.files", name)
