"""create_proxy(): the ASGI application of the proxy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from guardengine.engine.async_engine import AsyncEngine
from guardengine.proxy import routes
from guardengine.proxy.exchange import Proxy
from guardengine.proxy.metrics import ProxyMetrics
from guardengine.proxy.settings import ProxySettings
from guardengine.proxy.upstream import Upstream
from guardengine.server.app import app_around
from guardengine.server.routes import operations
from guardengine.server.service import Service


def create_proxy(engine: AsyncEngine, settings: ProxySettings) -> FastAPI:
    """The application: moderated chat completions of the upstream, and /health, /ready, /metrics as the server has
    them.

    engine: of a Stream checkpoint; it may be loading still. The app takes it over, as `create_app` does.
    """
    service = Service(engine, None, settings.server)
    upstream = Upstream(settings)

    @asynccontextmanager
    async def closing() -> AsyncIterator[None]:
        try:
            yield
        finally:
            await upstream.close()

    app = app_around(
        service,
        [operations.monitoring, routes.router],
        title="guardengine proxy",
        description="Chat completions of an LLM's server, moderated with Qwen3Guard.",
        beside=closing,
    )
    app.state.proxy = Proxy(service, settings, upstream, ProxyMetrics(service.metrics.registry))
    return app
