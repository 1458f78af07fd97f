"""GuardServer: an app on uvicorn, with limits on slow clients, and with an end that lets streams finish."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from guardengine.server.service import Service

logger = logging.getLogger("guardengine.server")

_CUT_OFF_S = 2.0
_CLOSE_S = 5  # the time that uvicorn has to close connections whose work has ended


class GuardServer(uvicorn.Server):
    """uvicorn with a graceful end. The first SIGTERM or SIGINT refuses new work with 503 and lets running work finish
    until the deadline; the second ends at once."""

    def __init__(self, app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> None:
        self._service: Service = app.state.service
        settings = self._service.settings

        class Protocol(_TimedProtocol):
            header_timeout_s = settings.header_timeout_s

        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=Protocol,
                ws=_CutOffProtocol,
                lifespan="on",
                access_log=False,  # its lines have full addresses of clients; Limits logs instead
                log_level="warning",
                log_config=None,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=settings.max_connections,
                timeout_keep_alive=int(max(1, settings.keep_alive_s)),
                timeout_graceful_shutdown=_CLOSE_S,
                ws_max_size=settings.max_frame_bytes,
                ws_per_message_deflate=False,  # 64 KiB a connection, and small frames hardly shrink
                **options,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.drain.has_begun:
            super().handle_exit(sig, frame)
            return
        asyncio.get_running_loop().call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Begin the graceful end. To be called on the event loop."""
        self._service.drain.begin()
        self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        logger.info("draining for at most %g s", self._service.drain.left_s)
        if not await self._service.drain.until_quiet():
            logger.warning("the deadline has come; what has not finished is cut off")
        self.should_exit = True

    @property
    def address(self) -> tuple[str, int]:
        """The host and port that it listens on, once it has started."""
        bound: socket.socket = self.servers[0].sockets[0]
        host, port = bound.getsockname()[:2]
        return host, port


class _CutOffProtocol(WebSocketsSansIOProtocol):
    """Closes the socket soon after its WebSocket was closed, whether or not the client has read everything. A client
    that never reads would keep the socket and its buffers forever."""

    async def send(self, message: Any) -> None:
        if message["type"] == "websocket.close":
            self.loop.call_later(_CUT_OFF_S, self.transport.abort)
        await super().send(message)
        if message["type"] == "websocket.http.response.body":
            self.handshake_complete = True  # a refusal completes it too; else each is logged as a fault


class _TimedProtocol(HttpToolsProtocol):
    """Closes connections whose request headers do not arrive in time; the time also runs while nothing arrives at
    all."""

    header_timeout_s = 10.0
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        if self._header_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_headers()
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def handle_websocket_upgrade(self) -> None:
        super().handle_websocket_upgrade()
        # connection_lost would do this; from now on that method is the WebSocket's.
        self.parser = None  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        self._header_timer = self.loop.call_later(self.header_timeout_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            self.transport.abort()
