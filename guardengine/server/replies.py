"""Answers that do not come from a route: refusals of middleware, and of anything that raised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from guardengine.server.statuses import Refusal


class AsciiJson(Response):
    """JSON with everything but ASCII escaped, so that any string can be sent."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def reply_of(refusal: Refusal, headers: Mapping[str, str] | None = None) -> AsciiJson:
    return AsciiJson(refusal.envelope, refusal.status, {**refusal.headers, **(headers or {})})


async def refuse(
    refusal: Refusal, scope: Scope, receive: Receive, send: Send, headers: Mapping[str, str] | None = None
) -> None:
    """Answer a request, or a WebSocket's handshake, with a refusal."""
    # Starlette's responses speak both: websocket.http.response.* where the scope is a WebSocket's.
    await reply_of(refusal, headers)(scope, receive, send)
