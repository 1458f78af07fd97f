"""The requests and answers of both clients: addresses, headers, bodies, errors. Does no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guardengine import errors
from guardengine.errors import ConfigError, GuardEngineError, ServerError

Json = dict[str, Any]

# The codes of errors that a caller can act on.
_ERRORS: Mapping[str, type[GuardEngineError]] = {
    "invalid_text": errors.InvalidText,
    "invalid_tokens": errors.InvalidTokens,
    "context_length_exceeded": errors.StreamTooLong,
    "invalid_option": errors.ConfigError,
    "invalid_request": errors.ConfigError,
    "overloaded": errors.Overloaded,
    "draining": errors.Overloaded,
    "stream_closed": errors.StreamClosed,
}


def error_of(envelope: Any, status: int | None = None) -> GuardEngineError:
    """The exception for an error answer, {"error": {"message": ..., "code": ...}}. status: of HTTP, for the message."""
    error = envelope.get("error") if isinstance(envelope, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return ServerError(f"the server answered with status {status} and no error that this client knows")
    kind = _ERRORS.get(str(error.get("code")), ServerError)
    status_text = "" if status is None or kind is not ServerError else f" (status {status})"
    return kind(f"{error['message']}{status_text}")


def json_of(status: int, read: Any) -> Json:
    """The JSON object of an answer.

    Args:
        status: The status of HTTP.
        read: Parses the answer; may raise ValueError.

    Raises:
        GuardEngineError: The error that the answer reports, or ServerError for an answer that is no JSON object.
    """
    try:
        found = read()
    except ValueError:
        found = None
    if status != 200 or not isinstance(found, dict):
        raise error_of(found, status)
    return found


@dataclass(frozen=True, slots=True)
class Address:
    """A server's address and the key for it. Raises ConfigError for a url that is not http or https."""

    url: str
    api_key: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url={self.url!r}: pass a URL such as http://127.0.0.1:8000")
        object.__setattr__(self, "url", self.url.rstrip("/").removesuffix("/v1"))

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    @property
    def websocket(self) -> str:
        return f"ws{self.url.removeprefix('http')}/v1/guard/stream"


def moderations_body(
    text: str | Sequence[str], taxonomy: str | None, policy: Mapping[str, Any] | None
) -> Json:
    """The body of POST /v1/moderations; options that are None are left out."""
    body = {"input": text if isinstance(text, str) else list(text), "taxonomy": taxonomy, "policy": policy}
    return _given(body)


def guard_body(
    messages: Sequence[Mapping[str, Any]],
    policy: Mapping[str, Any] | None,
    labels: str | None,
    timeout_s: float | None,
) -> Json:
    """The body of POST /v1/guard; options that are None are left out."""
    return _given({"messages": list(messages), "policy": policy, "labels": labels, "timeout_s": timeout_s})


def _given(body: Json) -> Json:
    return {name: value for name, value in body.items() if value is not None}
