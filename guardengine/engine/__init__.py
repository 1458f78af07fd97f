"""Engine and Stream, AsyncEngine and AsyncStream, and the thread between them."""

from __future__ import annotations

from typing import Any

from guardengine._moved import moved_name


def __getattr__(name: str) -> Any:
    return moved_name(__name__, "guardengine.engine.engine", name)
