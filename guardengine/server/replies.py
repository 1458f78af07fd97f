"""Answers that are made outside a route: refusals of middleware, and answers to exceptions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from guardengine.server.refusals import Refusal


class AsciiJson(Response):
    """A JSON answer in which everything but ASCII is escaped, so that any string can be sent, lone surrogates too."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def reply_of(refusal: Refusal, headers: Mapping[str, str] | None = None) -> AsciiJson:
    """The answer for a refusal."""
    return AsciiJson(refusal.envelope, refusal.status, {**refusal.headers, **(headers or {})})


async def refuse(
    refusal: Refusal, scope: Scope, receive: Receive, send: Send, headers: Mapping[str, str] | None = None
) -> None:
    """Answer a request, or a WebSocket's handshake, with a refusal."""
    # Starlette's responses can answer both: for a WebSocket they send websocket.http.response.*.
    await reply_of(refusal, headers)(scope, receive, send)
