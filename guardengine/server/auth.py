"""Who may call: Bearer keys on everything but health and the playground's page, which has no data. An ASGI middleware,
for HTTP and WebSocket alike.

Browsers' WebSockets cannot send headers, so there a key may also come as a subprotocol: `guardengine.key.KEY`, or
`guardengine.key64.` and the key in base64url without padding, for keys with characters that subprotocols may not have.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from guardengine.server.replies import refuse
from guardengine.server.service import Service
from guardengine.server.statuses import Refusal

HEALTH_PATHS = frozenset(("/health", "/ready"))
OPEN_PATHS = HEALTH_PATHS | {"/"}
KEY_SUBPROTOCOL, KEY64_SUBPROTOCOL = "guardengine.key.", "guardengine.key64."


class Authentication:
    """Lets through what has one of the keys, and notes its name as the tenant; everything where there are none."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._keys = app, service.settings.api_keys
        self._refused = service.metrics.refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or not self._keys or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        name = self._name_of(_presented(scope))
        if name is None:
            missing = "an API key is needed, as the header 'Authorization: Bearer KEY'"
            refusal = Refusal(401, missing, "invalid_api_key", type="authentication_error")
            self._refused.labels(refusal.code).inc()
            await refuse(refusal, scope, receive, send, {"WWW-Authenticate": "Bearer"})
            return
        scope["guardengine.tenant"] = name
        await self._app(scope, receive, send)

    def _name_of(self, key: bytes | None) -> str | None:
        """Looks at every key, whichever matches: how long it takes tells nothing."""
        digest = hashlib.sha256(key or b"").digest()
        found = None
        for known in self._keys:
            if hmac.compare_digest(known.digest, digest):
                found = known.name
        return found if key else None


def _presented(scope: Scope) -> bytes | None:
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
    """Of base64url without padding; None for what is none."""
    try:
        return base64.b64decode(key + "=" * (-len(key) % 4), altchars=b"-_", validate=True)
    except ValueError:
        return None
