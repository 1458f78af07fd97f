"""serve(): load the checkpoints, listen, and serve until a signal ends it."""

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
from guardengine.server.settings import ServerSettings
from guardengine.server.uvicorn_server import GuardServer

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
    """Serve checkpoints until SIGTERM or SIGINT.

    Args:
        checkpoint: The folder or hub id of a Stream checkpoint, or of a Gen checkpoint when it is the only one.
        revision: The revision of `checkpoint` on the hub.
        gen: The folder or hub id of a Gen checkpoint.
        gen_revision: The revision of `gen` on the hub.
        host: The address to listen on.
        port: The port to listen on; 0 takes any free port.
        options: Options of `AsyncEngine.from_pretrained`, for both checkpoints.
        settings: Names, defaults and limits of the server.
        log_level: The least level of messages on stderr.
        ssl_certfile: A certificate, for https.
        ssl_keyfile: The key of the certificate.

    Returns:
        0, the exit status of the command.

    Raises:
        CheckpointError: A checkpoint cannot be read. Nothing listens yet.
        ConfigError: An option is not valid, or the address is in use.
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
    """Run an app until a signal ends it; print to stdout what it does (`does`) and its address. Raises ConfigError for
    certificates that cannot be read."""
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
    except OSError as error:  # the files of the certificate
        raise ConfigError(f"cannot serve: {error}") from None


def warn_without_keys(settings: ServerSettings, host: str, port: int) -> None:
    """Log a warning when everybody on the network may call the server."""
    if not settings.api_keys and host not in _LOOPBACK:
        logger.warning(
            "no API keys: everybody who can reach %s:%d may use the server; see --api-key-file", host, port
        )


def bound(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. It is bound before checkpoints are loaded, so that a port in use is
    reported at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error}); is the port in use? --port 0 takes any"
        ) from None
    return listener


def by_kind(path: Path, gen: str | None, gen_revision: str | None) -> dict[str, Path]:
    """The folders by the kinds of their checkpoints, "stream" or "gen". Raises CheckpointError and ConfigError."""
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
    """Log guardengine's messages from this level on, and warnings of uvicorn, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name, least in (("guardengine", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(least)
        logger.propagate = False
