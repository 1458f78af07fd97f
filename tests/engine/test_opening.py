"""What a stream is opened with is the same for both engines."""

from __future__ import annotations

import inspect

import pytest

from guardengine import AsyncEngine, Engine


@pytest.mark.parametrize("method", ["open", "restore", "moderate", "moderate_many"])
def test_both_engines_take_the_same(method: str) -> None:
    sync, other = (inspect.signature(getattr(kind, method)).parameters for kind in (Engine, AsyncEngine))
    assert [(name, p.kind, p.default) for name, p in sync.items()] == [
        (name, p.kind, p.default) for name, p in other.items()
    ]
