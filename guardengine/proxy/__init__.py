"""guardengine.proxy: an OpenAI-compatible reverse proxy that moderates an LLM server's prompts and replies.

With the extra `proxy`: `guardengine proxy --upstream URL CHECKPOINT`; in Python,
`create_proxy(engine, settings)` is the ASGI application. Names are loaded on first use: the web framework is an extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guardengine.proxy.app import create_proxy
    from guardengine.proxy.settings import ProxySettings

__all__ = ["ProxySettings", "create_proxy"]


def __getattr__(name: str) -> Any:
    if name == "create_proxy":
        from guardengine.extras import check_installed

        check_installed("create_proxy", "proxy")
        from guardengine.proxy.app import create_proxy

        return create_proxy
    if name in __all__:
        from guardengine.proxy import settings

        return getattr(settings, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
