"""ServerSettings: everything that whoever runs the server may choose. ApiKey: who may use it. No web framework."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from guardengine.errors import ConfigError
from guardengine.policy import Policy

Taxonomy = Literal["qwen", "openai"]
GenMode = Literal["greedy", "choice"]

KEYS_VARIABLE = "GUARDENGINE_API_KEYS"
_KEY = re.compile(
    r"[!-+\--~]{16,512}"
)  # printable ASCII without the comma that separates keys in the variable
_NAME = re.compile(r"[\w.:@/-]{1,64}", re.ASCII)
# The scheme, host and port of a base URL, then its path: nothing that could end a header's part or a page's attribute.
_UPSTREAM = re.compile(
    r"(https?://(?:[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?)(?:/[\w.~%/-]*)?", re.ASCII | re.IGNORECASE
)


class ApiKey(NamedTuple):
    """A key as it is kept: its digest, and the name that stands for it in logs, metrics and limits by tenant."""

    name: str
    digest: bytes

    @staticmethod
    def of(key: str, name: str | None = None) -> ApiKey:
        """Raises ConfigError, without the key in it, for one that cannot be sent or is too short to be a secret."""
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
    """The keys of a file, one a line as `KEY` or `NAME KEY`, and those in GUARDENGINE_API_KEYS, between commas.

    Empty lines and those that begin with # are skipped. Raises ConfigError for a file that cannot be read or has no
    key, for a malformed key, and for a name or key that is there twice. Never shows a key.
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
                raise ConfigError(f"{file}, line {number}: 'KEY' or 'NAME KEY' is needed")
            keys.append(_read_key(words, f"{file}, line {number}"))
        if not keys:
            raise ConfigError(f"{file} has no API key; put one a line into it, or leave the option out")
    for part in environment.get(KEYS_VARIABLE, "").split(","):
        if words := part.split():
            keys.append(_read_key(words[-2:], KEYS_VARIABLE))
    for what, values in (("name", [key.name for key in keys]), ("key", [key.digest for key in keys])):
        if len(set(values)) < len(values):
            raise ConfigError(f"an API {what} is there twice; give each {what} once")
    return tuple(keys)


def _read_key(words: list[str], where: str) -> ApiKey:
    try:
        return ApiKey.of(words[-1], words[0] if len(words) == 2 else None)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Names, defaults and limits of one server. Times are in seconds, sizes in bytes.

    Raises ConfigError for values out of range.
    """

    model_name: str = "qwen3guard-stream"  # what the Stream checkpoint is called in requests and answers
    gen_model_name: str = "qwen3guard-gen"
    api_keys: tuple[ApiKey, ...] = ()  # none: everybody may use it
    policy: Policy = field(default_factory=Policy.strict)  # where a request has none
    taxonomy: Taxonomy = "qwen"
    gen_mode: GenMode = "greedy"
    cors_origins: tuple[str, ...] = ()  # of browsers' pages that may call; ("*",): all
    playground_upstream: str | None = (
        None  # an OpenAI-compatible API that the page at / may call from the browser
    )
    log_text: bool = False  # users' texts in the log

    max_body_bytes: int = 4 * 2**20
    max_inputs: int = 256  # of one /v1/moderations request
    max_parallel: int = 64  # conversations of one request that are open in the engine at a time
    max_requests: int = 256  # HTTP requests at a time
    max_connections: int = 4096  # sockets, idle ones included
    max_streams_per_connection: int = 256
    max_frame_bytes: int = 2**20  # of one WebSocket message
    max_queued_operations: int = 64  # of one stream, before its connection is read no further
    max_queued_events: int = 256  # of one connection, before its streams wait for the client to read

    header_timeout_s: float = 10.0  # from a connection, or a request's first byte, to its last header
    body_timeout_s: float = 30.0  # from a request's headers to the last byte of its body
    request_timeout_s: float = 120.0  # for the answer
    keep_alive_s: float = 30.0  # between two requests on one connection
    send_timeout_s: float = 30.0  # until a client takes an event
    idle_timeout_s: float = 300.0  # of a WebSocket without open streams
    health_timeout_s: float = 5.0
    drain_timeout_s: float = 30.0  # from SIGTERM to the end of streams that have not finished
    retry_after_s: float = 1.0  # told to clients that are refused

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("model_name", "gen_model_name"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)!r}: a non-empty string is needed")
        if self.model_name == self.gen_model_name:
            raise ConfigError(f"both models are named {self.model_name!r}; give them two names")
        for name, choices in (("taxonomy", ("qwen", "openai")), ("gen_mode", ("greedy", "choice"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose {' or '.join(map(repr, choices))}")
        if not isinstance(self.policy, Policy):
            raise ConfigError(f"policy={self.policy!r}: a Policy is needed, such as Policy.strict()")
        _check_all("api_keys", self.api_keys, ApiKey)
        _check_all("cors_origins", self.cors_origins, str)
        if self.playground_upstream is not None:
            origin_of(self.playground_upstream)


def origin_of(url: str) -> str:
    """A base URL's scheme, host and port, as a Content-Security-Policy names them. Raises ConfigError for what is none:
    it goes into a header and a page."""
    found = _UPSTREAM.fullmatch(url) if isinstance(url, str) else None
    if found is None:
        raise ConfigError(
            f"playground_upstream={url!r:.200}: a base URL such as http://127.0.0.1:8001/v1 is needed, without a "
            "password or a query"
        )
    return found[1]


def check_numbers(settings: Any) -> None:
    """Check the fields of some settings that are sizes (int) or times (float). Raises ConfigError naming the field."""
    for option in fields(settings):
        value = getattr(settings, option.name)
        if option.type == "int" and (
            isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**40
        ):
            raise ConfigError(f"{option.name}={value!r}: a whole number from 1 is needed")
        if option.type == "float" and not _is_seconds(value):
            raise ConfigError(f"{option.name}={value!r}: a number of seconds above 0 is needed")


def _is_seconds(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and 0 < value < 1e9
    )


def _check_all(name: str, values: Iterable[Any], kind: type) -> None:
    if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
        raise ConfigError(f"{name}={values!r:.80}: a tuple of {kind.__name__} is needed")
