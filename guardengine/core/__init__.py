"""The core: the books of all streams, KV blocks, the queue, and the step."""

from __future__ import annotations

from typing import Any

from guardengine._moved import moved_name


def __getattr__(name: str) -> Any:
    return moved_name(__name__, "guardengine.core.engine_core", name)
