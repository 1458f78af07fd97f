"""ServerSettings: the options of a server. ApiKey: a key of one of its clients. Imports no web framework."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from guardengine import checks
from guardengine.errors import ConfigError
from guardengine.policy import Policy

Taxonomy = Literal["qwen", "openai"]
GenMode = Literal["greedy", "choice"]

KEYS_VARIABLE = "GUARDENGINE_API_KEYS"
# Printable ASCII without the comma, which separates keys in the environment variable.
_KEY = re.compile(r"[!-+\--~]{16,512}")
_NAME = re.compile(r"[\w.:@/-]{1,64}", re.ASCII)
# The scheme, host and port of a base URL, then its path: nothing that could end a header's part or a page's attribute.
_UPSTREAM = re.compile(
    r"(https?://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?)(?:/[\w.~%/-]*)?", re.ASCII | re.IGNORECASE
)


class ApiKey(NamedTuple):
    """An API key as the server keeps it.

    Attributes:
        name: Stands for the key in logs, metrics and limits by tenant.
        digest: The sha256 of the key.
    """

    name: str
    digest: bytes

    @staticmethod
    def of(key: str, name: str | None = None) -> ApiKey:
        """Make one from a key.

        Args:
            key: 16 to 512 printable ASCII characters without spaces and commas.
            name: Up to 64 letters, digits and . : @ / - _; by default "key-" and the beginning of the digest.

        Raises:
            ConfigError: The key or the name is not valid. The message never shows the key.
        """
        if not _KEY.fullmatch(key):
            raise ConfigError(
                f"an API key of {len(key)} characters: 16 to 512 printable ASCII characters without spaces or commas "
                "are needed; python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one"
            )
        digest = hashlib.sha256(key.encode()).digest()
        if name is not None and not _NAME.fullmatch(name):
            raise ConfigError(
                f"API key name {name!r:.80}: up to 64 letters, digits and . : @ / - _ are needed"
            )
        return ApiKey(name or f"key-{digest.hex()[:8]}", digest)


def read_api_keys(
    file: str | Path | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[ApiKey, ...]:
    """Read the keys of a file and of the environment variable GUARDENGINE_API_KEYS.

    Args:
        file: Has one key a line, as `KEY` or `NAME KEY`. Empty lines and lines that begin with # are skipped.
        environment: Has the variable, with keys between commas.

    Raises:
        ConfigError: The file cannot be read or has no key, a key is not valid, or a name or key occurs twice. The
            message never shows a key.
    """
    keys: list[ApiKey] = []
    if file is not None:
        try:
            lines = Path(file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"the file of API keys cannot be read: {file}: {type(error).__name__}"
            ) from None
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) > 2:
                raise ConfigError(f"{file}, line {number}: expected 'KEY' or 'NAME KEY'")
            keys.append(_read_key(words, f"{file}, line {number}"))
        if not keys:
            raise ConfigError(f"{file} has no API key; put one a line into it, or leave the option out")
    for part in environment.get(KEYS_VARIABLE, "").split(","):
        if words := part.split():
            keys.append(_read_key(words[-2:], KEYS_VARIABLE))
    for what, values in (("name", [key.name for key in keys]), ("key", [key.digest for key in keys])):
        if len(set(values)) < len(values):
            raise ConfigError(f"an API {what} occurs twice; give each {what} once")
    return tuple(keys)


def _read_key(words: list[str], where: str) -> ApiKey:
    try:
        return ApiKey.of(words[-1], words[0] if len(words) == 2 else None)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Names, defaults and limits of one server. Times are in seconds, sizes in bytes.

    Attributes:
        model_name: The name of the Stream checkpoint in requests and answers.
        gen_model_name: The name of the Gen checkpoint in requests and answers.
        api_keys: The keys that clients may use. Without any, everybody may use the server.
        policy: The policy of requests that bring none.
        taxonomy: The names of categories in answers of /v1/moderations, "qwen" or "openai".
        gen_mode: How a Gen checkpoint answers: "greedy" writes what the model finds likeliest, "choice" only what the
            grammar of answers allows.
        cors_origins: Origins of web pages whose scripts may call the server; ("*",) is all.
        playground_upstream: The base URL of an OpenAI-compatible API that the page at / may call from the browser.
        log_text: Write users' texts to the log.
        max_body_bytes: Largest body of a request.
        max_inputs: Most texts in one request of /v1/moderations.
        max_parallel: Most conversations of one request that are open in the engine at the same time.
        max_requests: Most HTTP requests at the same time.
        max_connections: Most sockets, idle ones included.
        max_streams_per_connection: Most open streams of one WebSocket.
        max_frame_bytes: Largest message of a WebSocket.
        max_queued_operations: Most operations that wait on one stream; then its connection is read no further.
        max_queued_events: Most events that wait on one connection; then its streams wait for the client to read.
        header_timeout_s: From the start of a connection or request to its last header.
        body_timeout_s: From a request's headers to the last byte of its body.
        request_timeout_s: From a request to the end of its answer.
        keep_alive_s: Between two requests on one connection.
        send_timeout_s: Until a client has taken an event.
        idle_timeout_s: How long a WebSocket without open streams stays open.
        health_timeout_s: Within which /health must hear from every model.
        drain_timeout_s: From SIGTERM to the end of streams that have not finished.
        retry_after_s: When refused clients are told to come back.

    Raises:
        ConfigError: A value is not valid.
    """

    model_name: str = "qwen3guard-stream"
    gen_model_name: str = "qwen3guard-gen"
    api_keys: tuple[ApiKey, ...] = ()
    policy: Policy = field(default_factory=Policy.strict)
    taxonomy: Taxonomy = "qwen"
    gen_mode: GenMode = "greedy"
    cors_origins: tuple[str, ...] = ()
    playground_upstream: str | None = None
    log_text: bool = False

    max_body_bytes: int = 4 * 2**20
    max_inputs: int = 256
    max_parallel: int = 64
    max_requests: int = 256
    max_connections: int = 4096
    max_streams_per_connection: int = 256
    max_frame_bytes: int = 2**20
    max_queued_operations: int = 64
    max_queued_events: int = 256

    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    request_timeout_s: float = 120.0
    keep_alive_s: float = 30.0
    send_timeout_s: float = 30.0
    idle_timeout_s: float = 300.0
    health_timeout_s: float = 5.0
    drain_timeout_s: float = 30.0
    retry_after_s: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("model_name", "gen_model_name"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)!r}: pass a non-empty string")
        if self.model_name == self.gen_model_name:
            raise ConfigError(f"both models are named {self.model_name!r}; give them two names")
        for name, choices in (("taxonomy", ("qwen", "openai")), ("gen_mode", ("greedy", "choice"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose {' or '.join(map(repr, choices))}")
        if not isinstance(self.policy, Policy):
            raise ConfigError(f"policy={self.policy!r}: pass a Policy, such as Policy.strict()")
        _check_all("api_keys", self.api_keys, ApiKey)
        _check_all("cors_origins", self.cors_origins, str)
        if self.playground_upstream is not None:
            origin_of(self.playground_upstream)


def origin_of(url: str) -> str:
    """The scheme, host and port of a base URL, as a Content-Security-Policy names them. Raises ConfigError for
    anything else, because it goes into a header and a page."""
    found = _UPSTREAM.fullmatch(url) if isinstance(url, str) else None
    if found is None:
        raise ConfigError(
            f"playground_upstream={url!r:.200}: a base URL such as http://127.0.0.1:8001/v1 is needed, without a "
            "password or a query"
        )
    return found[1]


def check_numbers(settings: Any) -> None:
    """Check the fields of a settings object that are sizes (int) or times (float). Raises ConfigError naming the
    field."""
    for option in fields(settings):
        value = getattr(settings, option.name)
        if option.type == "int":
            checks.whole_number(option.name, value, 1, 2**40)
        if option.type == "float" and not _is_seconds(value):
            raise ConfigError(f"{option.name}={value!r}: pass a number of seconds above 0 and below 1e9")


def _is_seconds(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and 0 < value < 1e9
    )


def _check_all(name: str, values: Iterable[Any], kind: type) -> None:
    if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
        raise ConfigError(f"{name}={values!r:.80}: pass a tuple of {kind.__name__}")
