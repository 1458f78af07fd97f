"""serve_proxy(): load the checkpoint, listen, and stay until told to go."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from typing import Any

from guardengine.checkpoint.hub import resolve_checkpoint
from guardengine.engine.async_engine import AsyncEngine
from guardengine.proxy.app import create_proxy
from guardengine.proxy.settings import ProxySettings
from guardengine.server.serve import bound, listen, log_to_stderr, warn_without_keys

logger = logging.getLogger("guardengine.proxy")


def serve_proxy(
    checkpoint: str,
    settings: ProxySettings,
    *,
    revision: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    options: dict[str, Any] | None = None,
    log_level: str = "info",
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT; returns 0. options: of Engine.from_pretrained.

    Raises CheckpointError and ConfigError before it listens, and ConfigError when it cannot listen.
    """
    log_to_stderr(log_level)
    path = resolve_checkpoint(checkpoint, revision)
    if not settings.forward_authorization:  # else it is the upstream that knows who may call
        warn_without_keys(settings.server, host, port)
    with bound(host, port) as listener:
        return asyncio.run(_serve(path, settings, listener, options or {}, ssl_certfile, ssl_keyfile))


async def _serve(
    path: Path,
    settings: ProxySettings,
    listener: socket.socket,
    options: dict[str, Any],
    ssl_certfile: str | None,
    ssl_keyfile: str | None,
) -> int:
    engine = await AsyncEngine.from_pretrained(path, **options)
    try:
        app = create_proxy(engine, settings)
        await listen(app, listener, f"guards {settings.upstream}", ssl_certfile, ssl_keyfile)
    finally:
        await engine.close(drain=False)
    return 0
