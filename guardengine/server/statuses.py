"""What went wrong, as clients are told: one table from errors to HTTP statuses, and OpenAI's error envelope.

The WebSocket protocol uses the same codes. Messages come from errors raised on purpose only; of others the client
learns that they happened.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from guardengine import errors


class Refusal(Exception):
    """A request that is refused. message, type, param and code are those of the envelope; retry_after_s: when to come
    again."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        type: str = "invalid_request_error",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.type = status, code, param, type
        self.retry_after_s = retry_after_s

    @property
    def envelope(self) -> dict[str, Any]:
        """{"error": {...}} as OpenAI's API has it."""
        return {
            "error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code},
        }

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, round(self.retry_after_s)))}


class _Row(NamedTuple):
    status: int
    type: str
    code: str


# Subclasses before what they are subclasses of.
_TABLE: tuple[tuple[type[Exception], _Row], ...] = (
    (errors.InvalidText, _Row(400, "invalid_request_error", "invalid_text")),
    (errors.InvalidTokens, _Row(400, "invalid_request_error", "invalid_tokens")),
    (errors.StreamTooLong, _Row(400, "invalid_request_error", "context_length_exceeded")),
    (errors.ConfigError, _Row(400, "invalid_request_error", "invalid_option")),
    (errors.Overloaded, _Row(429, "rate_limit_error", "overloaded")),
    (errors.StreamClosed, _Row(503, "server_error", "stream_closed")),
    (errors.AuditError, _Row(503, "server_error", "audit_unavailable")),
    (errors.GuardEngineError, _Row(500, "server_error", "internal_error")),
    (TimeoutError, _Row(504, "server_error", "timeout")),
)
_COME_AGAIN = (429, 503)


def refusal_of(error: BaseException, retry_after_s: float, param: str | None = None) -> Refusal:
    """What the client is told of an error."""
    if isinstance(error, Refusal):
        return error
    row = next((row for kind, row in _TABLE if isinstance(error, kind)), None)
    if row is None:
        return Refusal(500, "the server failed; its log says why", "internal_error", type="server_error")
    message = str(error) if isinstance(error, errors.GuardEngineError) else "the answer was not there in time"
    come_again = retry_after_s if row.status in _COME_AGAIN else None
    return Refusal(row.status, message, row.code, param=param, type=row.type, retry_after_s=come_again)


def not_served(what: str, mend: str) -> Refusal:
    return Refusal(404, f"{what} is not served here; {mend}", "model_not_found", param="model")
