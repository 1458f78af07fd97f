"""Authentication: API keys on everything except health and the page of the playground, which has no data. An ASGI
middleware for HTTP and WebSocket.

Browsers cannot send headers with a WebSocket, so there a key may also come as a subprotocol: `guardengine.key.KEY`, or
`guardengine.key64.` and the key in base64url without padding, for keys with characters that a subprotocol must not
have.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from guardengine.server.refusals import Refusal
from guardengine.server.replies import refuse
from guardengine.server.service import Service

HEALTH_PATHS = frozenset(("/health", "/ready"))
OPEN_PATHS = HEALTH_PATHS | {"/"}
KEY_SUBPROTOCOL, KEY64_SUBPROTOCOL = "guardengine.key.", "guardengine.key64."


class Authentication:
    """Lets a request pass that has one of the keys, and stores the key's name as its tenant. Without any keys, every
    request passes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._keys = app, service.settings.api_keys
        self._refused = service.metrics.refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or not self._keys or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        name = self._name_of(_presented(scope))
        if name is None:
            missing = "no valid API key; send one in the header 'Authorization: Bearer KEY'"
            refusal = Refusal(401, missing, "invalid_api_key", type="authentication_error")
            self._refused.labels(refusal.code).inc()
            await refuse(refusal, scope, receive, send, {"WWW-Authenticate": "Bearer"})
            return
        scope["guardengine.tenant"] = name
        await self._app(scope, receive, send)

    def _name_of(self, key: bytes | None) -> str | None:
        """The name of a key, None for an unknown one. Compares with every key, so that the time it takes says
        nothing."""
        digest = hashlib.sha256(key or b"").digest()
        name = None
        for known in self._keys:
            if hmac.compare_digest(known.digest, digest):
                name = known.name
        return name if key else None


def _presented(scope: Scope) -> bytes | None:
    """The key that a request or WebSocket came with."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            return key.strip() if scheme.lower() == b"bearer" else None
    for protocol in scope.get("subprotocols", ()):
        if protocol.startswith(KEY_SUBPROTOCOL):
            return protocol.removeprefix(KEY_SUBPROTOCOL).encode("latin-1", "replace")  # type: ignore[no-any-return]
        if protocol.startswith(KEY64_SUBPROTOCOL):
            return _decoded(protocol.removeprefix(KEY64_SUBPROTOCOL))
    return None


def _decoded(key: str) -> bytes | None:
    """The bytes of base64url without padding; None for anything else."""
    try:
        return base64.b64decode(key + "=" * (-len(key) % 4), altchars=b"-_", validate=True)
    except ValueError:
        return None
