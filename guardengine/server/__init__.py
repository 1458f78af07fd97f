"""guardengine.server: the HTTP and WebSocket service around AsyncEngine. The extra `server`.

`create_app(engine)` is an ASGI application for any server; `guardengine serve` runs it on uvicorn with limits on slow
clients and a graceful end. Names are loaded on first use, because the web framework is an extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guardengine.server.app import create_app
    from guardengine.server.settings import ApiKey, ServerSettings

__all__ = ["ApiKey", "ServerSettings", "create_app"]


def __getattr__(name: str) -> Any:
    if name == "create_app":
        from guardengine.extras import check_installed

        check_installed("create_app", "server")
        from guardengine.server.app import create_app

        return create_app
    if name in __all__:
        from guardengine.server import settings

        return getattr(settings, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
