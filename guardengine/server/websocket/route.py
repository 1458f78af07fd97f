"""The WebSocket at /v1/guard/stream: many streams on one connection. Messages: docs/serving/protocol.md.

One task reads frames and hands them to their streams, waiting where a stream has enough to do; one writes events, for
which streams wait where the client does not read. Nothing is queued without a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, WebSocket
from starlette.websockets import WebSocketDisconnect

from guardengine._version import __version__
from guardengine.engine.async_engine import AsyncEngine
from guardengine.server.limits import log_error, logger
from guardengine.server.refusals import Refusal
from guardengine.server.replies import reply_of
from guardengine.server.service import Service, service_of, tenant_of, too_many
from guardengine.server.websocket.protocol import PROTOCOL, Open, read_frame, stream_id_of
from guardengine.server.websocket.session import Event, Link, StreamSession

router = APIRouter()


@router.websocket("/v1/guard/stream")
async def guard_stream(websocket: WebSocket) -> None:
    service = service_of(websocket)
    offered = websocket.scope.get("subprotocols") or []
    try:
        service.drain.check()
        _check_origin(websocket, service)
        engine = service.stream_engine()
        if offered and PROTOCOL not in offered:
            raise Refusal(400, f"none of the subprotocols offered is {PROTOCOL}", "unknown_protocol")
    except Refusal as refusal:
        service.metrics.refused.labels(refusal.code).inc()
        await websocket.send_denial_response(reply_of(refusal))
        return
    await websocket.accept(PROTOCOL if offered else None)
    with service.metrics.connections.track_inprogress():
        await Connection(websocket, service, engine, tenant_of(websocket)).run()


class Connection:
    """One WebSocket and its streams."""

    def __init__(self, websocket: WebSocket, service: Service, engine: AsyncEngine, tenant: str) -> None:
        self._websocket, self._service, self._engine, self._tenant = websocket, service, engine, tenant
        self._events: asyncio.Queue[Event] = asyncio.Queue(service.settings.max_queued_events)
        self._sessions: dict[str, StreamSession] = {}
        self._is_drained = asyncio.Event()

    async def run(self) -> None:
        """Serve until the client or the server ends it."""
        with self._service.drain.listen(self._drain):
            tasks = [
                asyncio.create_task(part) for part in (self._read(), self._write(), self._is_drained.wait())
            ]
            try:
                finished, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if finished == {tasks[2]}:
                    await self._flush()
            finally:
                ended = await _end(tasks)  # first, as one of them makes sessions
                await _end([session.task for session in self._sessions.values() if session.task is not None])
            with contextlib.suppress(Exception):  # gone already
                async with asyncio.timeout(1.0):  # wait_for may leave a task and its error holding each other
                    await self._websocket.close(*self._closing(ended))

    def _closing(self, ended: list[Any]) -> tuple[int, str]:
        """The code and the reason to close with, by what the tasks came to. Their errors are not raised here: one that
        had passed through a call that holds its task would keep both for the garbage collector."""
        if not any(isinstance(outcome, WebSocketDisconnect) for outcome in ended):
            for outcome in ended:
                if isinstance(outcome, tuple):
                    return outcome
                if isinstance(outcome, TimeoutError):
                    return 1008, "events were not read in time"
                if isinstance(outcome, Exception):
                    log_error(outcome, with_message=self._service.settings.log_text)
                    return 1011, "the server failed"
        return 1001, "the server is shutting down"

    # -- frames --------------------------------------------------------------------------------------------

    async def _read(self) -> tuple[int, str]:
        """Take frames until the client is idle for too long; returns why the connection ends."""
        settings = self._service.settings
        await self._events.put(self._hello())
        if self._service.drain.has_begun:
            self._drain()
        while True:
            try:
                async with asyncio.timeout(settings.idle_timeout_s):  # wait_for may swallow a cancellation
                    message = await self._websocket.receive()
            except TimeoutError:
                if self._sessions:
                    continue
                return 1001, f"no stream was open for idle_timeout_s={settings.idle_timeout_s:g}"
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1006))
            frame = message.get("text")
            try:
                if frame is None:
                    raise Refusal(400, "the frame is binary; send JSON as text", "invalid_request")
                if settings.log_text:
                    logger.info("frame: %r", frame[:2000])
                await self._take(frame)
            except Refusal as refusal:
                self._service.metrics.refused.labels(refusal.code).inc()
                stream = None if frame is None else stream_id_of(frame)
                await self._events.put({"type": "error", "stream": stream, **refusal.envelope})

    async def _take(self, frame: str) -> None:
        operation = read_frame(frame)
        if isinstance(operation, Open):
            self._service.drain.check()
            self._check_new(operation.stream)
            session = StreamSession.start(self._link(), operation)
            self._sessions[operation.stream] = session
            return
        found = self._sessions.get(operation.stream)
        if found is None or found.task is None:
            raise Refusal(
                404,
                "no such stream is open on this connection; open it first",
                "unknown_stream",
                param="stream",
            )
        await found.put(operation)

    def _link(self) -> Link:
        """Made for each stream: one that is kept here would keep this connection for the garbage collector."""
        return Link(self._service, self._engine, self._tenant, self._events.put, self._branch, self._forget)

    def _check_new(self, name: str) -> None:
        most = self._service.settings.max_streams_per_connection
        if name in self._sessions:
            raise Refusal(
                409, "a stream of this id is open on this connection", "stream_exists", param="stream"
            )
        if len(self._sessions) >= most:
            raise too_many(
                "streams are open on this connection",
                most,
                "max_streams_per_connection",
                self._service.settings.retry_after_s,
            )

    def _branch(self, name: str, session: StreamSession) -> None:
        self._service.drain.check()
        self._check_new(name)
        self._sessions[name] = session

    def _forget(self, name: str) -> None:
        self._sessions.pop(name, None)
        if self._service.drain.has_begun and not self._sessions:
            self._is_drained.set()

    # -- events --------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        while True:
            event = await self._events.get()
            await self._send(event)

    async def _send(self, event: Event) -> None:
        text = json.dumps(event, allow_nan=False, separators=(",", ":"))
        async with asyncio.timeout(self._service.settings.send_timeout_s):
            await self._websocket.send_text(text)

    async def _flush(self) -> None:
        """Send what is queued, before the end."""
        while not self._events.empty():
            await asyncio.sleep(0.01)

    def _drain(self) -> None:
        with contextlib.suppress(asyncio.QueueFull):  # a client that reads nothing is not told either
            deadline_s = round(self._service.drain.left_s, 3)
            self._events.put_nowait({"type": "draining", "deadline_s": deadline_s})
        for session in list(self._sessions.values()):
            session.drain()
        if not self._sessions:
            self._is_drained.set()

    def _hello(self) -> dict[str, Any]:
        info, settings = self._engine.info, self._service.settings
        return {
            "type": "hello",
            "protocol": PROTOCOL,
            "version": __version__,
            "model": settings.model_name,
            "risks": list(info.risks),
            "categories": {role: list(info.categories[role]) for role in ("user", "assistant")},
            "limits": {
                "max_model_len": info.max_model_len,
                "max_frame_bytes": settings.max_frame_bytes,
                "max_streams_per_connection": settings.max_streams_per_connection,
            },
        }


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> list[Any]:
    """Cancel tasks and wait for them; returns their results, errors included."""
    for task in tasks:
        task.cancel()
    return await asyncio.gather(*tasks, return_exceptions=True)


def _check_origin(websocket: WebSocket, service: Service) -> None:
    """Raise Refusal for a browser's page of another origin: what CORS does not do for WebSockets."""
    origin, allowed = websocket.headers.get("origin"), service.settings.cors_origins
    if origin is None or origin in allowed or "*" in allowed:
        return
    if origin.partition("://")[2] != websocket.headers.get("host"):
        raise Refusal(
            403, "pages of this origin may not connect; --cors-origin allows it", "origin_not_allowed"
        )
