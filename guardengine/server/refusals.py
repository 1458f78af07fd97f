"""Errors as clients see them: one table from exceptions to HTTP statuses, and OpenAI's error envelope.

The WebSocket protocol uses the same codes. The messages of guardengine's own errors are sent to the client; of any
other error the client learns only that it happened.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from guardengine import errors


class Refusal(Exception):
    """A request that is refused.

    Args:
        status: The HTTP status.
        message: What is wrong, and what to do.
        code: The code of the error in the envelope.
        param: The field of the request that is wrong.
        type: The type of the error in the envelope.
        retry_after_s: Seconds after which the client may try again, for the header Retry-After.
    """

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
        """The body of the answer, {"error": {...}}, like OpenAI's API."""
        return {
            "error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code},
        }

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After, where the client may try again."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, round(self.retry_after_s)))}


class _Row(NamedTuple):
    status: int
    type: str
    code: str


# A subclass stands before its superclass.
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
    """The refusal for an exception. retry_after_s: for overload and other states that pass. param: the field of the
    request that is wrong."""
    if isinstance(error, Refusal):
        return error
    row = next((row for kind, row in _TABLE if isinstance(error, kind)), None)
    if row is None:
        return Refusal(500, "the server failed; its log says why", "internal_error", type="server_error")
    message = (
        str(error) if isinstance(error, errors.GuardEngineError) else "the answer took too long; try again"
    )
    come_again = retry_after_s if row.status in _COME_AGAIN else None
    return Refusal(row.status, message, row.code, param=param, type=row.type, retry_after_s=come_again)


def not_served(what: str, mend: str) -> Refusal:
    """The refusal, 404, of a request for a model that this server does not have."""
    return Refusal(404, f"{what} is not served here; {mend}", "model_not_found", param="model")
