"""serve(): load the checkpoints, listen, and stay until told to go."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from guardengine.checkpoint.hub import resolve_checkpoint
from guardengine.checkpoint.model_config import ModelConfig
from guardengine.engine.async_engine import AsyncEngine
from guardengine.engine.memory import collect_rarely
from guardengine.errors import CheckpointError, ConfigError
from guardengine.server.app import create_app
from guardengine.server.run import GuardServer
from guardengine.server.settings import ServerSettings

logger = logging.getLogger("guardengine.server")

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    checkpoint: str,
    *,
    revision: str | None = None,
    gen: str | None = None,
    gen_revision: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    options: dict[str, Any] | None = None,
    settings: ServerSettings | None = None,
    log_level: str = "info",
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT; returns 0. options: of Engine.from_pretrained, for both checkpoints.

    Raises CheckpointError and ConfigError before it listens, and ConfigError when it cannot listen.
    """
    settings = settings or ServerSettings()
    log_to_stderr(log_level)
    paths = by_kind(resolve_checkpoint(checkpoint, revision), gen, gen_revision)
    warn_without_keys(settings, host, port)
    with bound(host, port) as listener:
        return asyncio.run(_serve(paths, listener, options or {}, settings, ssl_certfile, ssl_keyfile))


async def _serve(
    paths: dict[str, Path],
    listener: socket.socket,
    options: dict[str, Any],
    settings: ServerSettings,
    ssl_certfile: str | None,
    ssl_keyfile: str | None,
) -> int:
    engines: dict[str, AsyncEngine] = {}
    try:
        for kind, path in paths.items():
            own = {name: value for name, value in options.items() if kind == "stream" or name != "audit_log"}
            engines[kind] = await AsyncEngine.from_pretrained(path, **own)
        app = create_app(engines.get("stream"), gen=engines.get("gen"), settings=settings)
        names = ", ".join(app.state.service.engines)
        await listen(app, listener, f"serves {names}", ssl_certfile, ssl_keyfile)
    finally:
        for engine in engines.values():
            await engine.close(drain=False)
    return 0


async def listen(
    app: FastAPI, listener: socket.socket, does: str, ssl_certfile: str | None, ssl_keyfile: str | None
) -> None:
    """Run an app until it is told to go, and say on stdout what it does and where. Raises ConfigError for certificates
    that cannot be read."""
    collect_rarely()
    server = GuardServer(app, ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile)
    running = asyncio.create_task(server.serve([listener]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    if server.started:
        scheme = "http" if ssl_certfile is None else "https"
        host, port = listener.getsockname()[:2]
        print(f"guardengine {does} on {scheme}://{_shown(host)}:{port}", flush=True)
    try:
        await running
    except OSError as error:  # of the certificate's files
        raise ConfigError(f"cannot serve: {error}") from None


def warn_without_keys(settings: ServerSettings, host: str, port: int) -> None:
    """Say so where everybody may call from elsewhere."""
    if not settings.api_keys and host not in _LOOPBACK:
        logger.warning("no API keys: whoever reaches %s:%d may call; see --api-key-file", host, port)


def bound(host: str, port: int) -> socket.socket:
    """A socket that nobody can connect to yet. Asked for first: loading takes longer than finding a port in use."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error}); is the port in use? --port 0 takes any"
        ) from None
    return found


def by_kind(path: Path, gen: str | None, gen_revision: str | None) -> dict[str, Path]:
    """Folders by the kind of their checkpoints, "stream" or "gen". Raises CheckpointError and ConfigError."""
    paths = {_kind(path): path}
    if gen is not None:
        if "gen" in paths:
            raise ConfigError(
                f"{path} is a Gen checkpoint already; give the Stream checkpoint first, then --gen"
            )
        paths["gen"] = resolve_checkpoint(gen, gen_revision)
        if _kind(paths["gen"]) != "gen":
            raise ConfigError(f"--gen {gen} is a Stream checkpoint; give a Qwen3Guard-Gen one")
    return paths


def _kind(path: Path) -> str:
    file = path / "config.json"
    try:
        return ModelConfig.from_dict(json.loads(file.read_text()), str(file)).kind
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({type(error).__name__}); give a checkpoint's folder"
        ) from None


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def log_to_stderr(level: str) -> None:
    """What guardengine logs, from this level on, and warnings of uvicorn's."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name, least in (("guardengine", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(least)
        logger.propagate = False
