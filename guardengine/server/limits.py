"""Limits on HTTP requests: how many, how large, how long. An ASGI middleware around everything else.

The body of a request is read here, within its limits of size and time, before anything else runs. When the client
hangs up, its request is cancelled. This middleware also counts requests, logs a line for each, and answers when
something has raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guardengine.server.auth import HEALTH_PATHS
from guardengine.server.refusals import Refusal, refusal_of
from guardengine.server.replies import refuse
from guardengine.server.service import Service, too_many

logger = logging.getLogger("guardengine.server")

_GONE = 499  # in log and metrics: the client hung up
_MONITORING = HEALTH_PATHS | {"/metrics"}  # answered while full or draining
_LONGEST_LOGGED = 2000


class Limits:
    """The middleware of one Service. paths: those that metrics may name; all others, which clients choose, are
    "other"."""

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]) -> None:
        self._app, self._service = app, service
        self._paths = paths
        self._num_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), _GONE

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics, path = self._service.metrics, scope["path"]
        metrics.requests_running.inc()
        try:
            if not await self._run(scope, receive, send_on):
                status = _GONE
        except Refusal as refusal:
            metrics.refused.labels(refusal.code).inc()
            # The rest of the body is not read.
            await refuse(refusal, scope, receive, send_on, {"Connection": "close"})
        finally:
            metrics.requests_running.dec()
            took = time.perf_counter() - began
            known = path if path in self._paths else "other"
            metrics.http_requests.labels(known, str(status)).inc()
            metrics.latency.labels(known).observe(took)
            tenant = scope.get("guardengine.tenant", "-")
            logger.info("%s %s %d %.1f ms %s", scope["method"], known, status, 1e3 * took, tenant)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Whether the request was answered; False when the client hung up. Raises Refusal for a request that is not
        begun."""
        settings, is_monitoring = self._service.settings, scope["path"] in _MONITORING
        if is_monitoring:
            return await self._answer(scope, b"", receive, send)
        self._service.drain.check()
        if self._num_running >= settings.max_requests:
            raise too_many(
                "requests are under way", self._num_running, "max_requests", settings.retry_after_s
            )
        self._num_running += 1
        try:
            with self._service.drain.work():
                body = await self._read_body(scope, receive)
                if body is None:
                    return False
                if settings.log_text and body:
                    logger.info("body: %r", body[:_LONGEST_LOGGED])
                return await self._answer(scope, body, receive, send)
        finally:
            self._num_running -= 1

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None when the client hung up."""
        settings = self._service.settings
        most = settings.max_body_bytes
        too_large = Refusal(
            413,
            f"the body is larger than max_body_bytes={most}; send fewer inputs at a time",
            "body_too_large",
        )
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value[:20]) > most:
                raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refusal(
                408, f"the body took longer than body_timeout_s={settings.body_timeout_s:g}", "body_timeout"
            ) from None

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> bool:
        is_gone, has_begun, is_read = asyncio.Event(), False, False

        async def receive_again() -> Message:
            nonlocal is_read
            if not is_read:
                is_read = True
                return {"type": "http.request", "body": body, "more_body": False}
            await is_gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            is_gone.set()

        async def send_on(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        async def run() -> None:
            try:
                async with asyncio.timeout(self._service.settings.request_timeout_s):
                    await self._app(scope, receive_again, send_on)
            except Exception as error:
                refusal = refusal_of(error, self._service.settings.retry_after_s)
                self._service.metrics.refused.labels(refusal.code).inc()
                if refusal.status == 500:
                    log_error(error, with_message=self._service.settings.log_text)
                if not has_begun:
                    await refuse(refusal, scope, receive_again, send_on)

        answer, watcher = asyncio.create_task(run()), asyncio.create_task(watch())
        try:
            await asyncio.wait((answer, watcher), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and has_begun:  # a streamed answer notices by itself that the client is gone
                await asyncio.wait((answer,), timeout=1.0)
            return answer.done()
        finally:
            for task in (answer, watcher):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(answer, watcher, return_exceptions=True)


def log_error(error: BaseException, *, with_message: bool) -> None:
    """Log an unexpected error, by default without its message, which may quote a user's text."""
    where = "".join(traceback.format_tb(error.__traceback__))
    message: Any = error if with_message else "(the message may quote text: --log-text)"
    logger.error("%s: %s\n%s", type(error).__name__, message, where)
