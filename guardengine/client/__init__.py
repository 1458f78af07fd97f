"""guardengine.client: GuardClient and AsyncGuardClient for `guardengine serve`. The extra `client`.

The clients do not need torch, and nothing of the engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guardengine.client.async_client import AsyncGuardClient, AsyncGuardStream
    from guardengine.client.conversation import Update
    from guardengine.client.sync_client import GuardClient, GuardStream

_HOME = {
    "AsyncGuardClient": "async_client",
    "AsyncGuardStream": "async_client",
    "GuardClient": "sync_client",
    "GuardStream": "sync_client",
    "Update": "conversation",
}

__all__ = ["AsyncGuardClient", "AsyncGuardStream", "GuardClient", "GuardStream", "Update"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from guardengine.extras import check_installed

    check_installed(f"guardengine.client.{name}", "client")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
