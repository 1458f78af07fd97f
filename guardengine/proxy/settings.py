"""ProxySettings: everything that whoever runs the proxy may choose. No web framework."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from guardengine.errors import ConfigError
from guardengine.server.settings import ServerSettings, check_numbers

OnBlock = Literal["filter", "refuse", "error"]

PASS_HEADERS = ("traceparent", "tracestate", "x-request-id")
_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,100}")
_KEY = re.compile(r"[!-~]{1,4096}")
# What a client's header must never decide.
_OWN_NAMES = (
    "accept accept-encoding authorization connection content-encoding content-length content-type cookie expect "
    "forwarded host keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    "upgrade user-agent via"
)
_OWN_HEADERS = frozenset(_OWN_NAMES.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    """How one proxy moderates and whom it asks. Times are in seconds, sizes in bytes.

    upstream: the LLM server's address, such as http://localhost:8001; a path before /v1 is kept, /v1 itself is not
    needed. upstream_key: sent to it as `Authorization: Bearer KEY`. server: keys, policy and limits of this side.

    on_block, where a reply is blocked: "filter" ends it with finish_reason "content_filter", "refuse" with `refusal`
    and "stop", "error" with an error. on_blocked_prompt: "error" is HTTP 400 with the code "content_filter"; "filter"
    and "refuse" answer as if the LLM had, with nothing or with `refusal`.

    pass_unread: names of request fields and of content parts (image_url, input_audio, ...) that go to the LLM although
    the guard does not read them. pass_headers: names of clients' headers that go to it.

    Raises ConfigError for values out of range or contradicting each other.
    """

    upstream: str
    upstream_key: str | None = field(default=None, repr=False)
    server: ServerSettings = field(default_factory=lambda: ServerSettings(request_timeout_s=600.0))
    on_block: OnBlock = "filter"
    on_blocked_prompt: OnBlock = "error"
    refusal: str = "I cannot help with that."
    forward_authorization: bool = False  # the client's own, where there is no key for the upstream
    pass_headers: tuple[str, ...] = PASS_HEADERS
    pass_unread: tuple[str, ...] = ()

    prompt_timeout_s: float = 30.0  # until the prompt's label is there
    append_timeout_s: float = 5.0  # until the labels of a piece of the reply are
    connect_timeout_s: float = 10.0
    upstream_timeout_s: float = 300.0  # of silence from the upstream

    max_choices: int = 16  # n of a request
    max_event_bytes: int = 2**20  # of one server-sent event
    max_reply_bytes: int = 2**24  # of a reply that is not streamed
    # Of one reply, that wait for their labels before the upstream is read no further.
    max_held_chars: int = 2**16

    def __post_init__(self) -> None:
        check_numbers(self)
        object.__setattr__(self, "upstream", _checked_address(self.upstream))
        for option in ("on_block", "on_blocked_prompt"):
            if getattr(self, option) not in ("filter", "refuse", "error"):
                raise ConfigError(
                    f"{option}={getattr(self, option)!r:.80}: choose 'filter', 'refuse' or 'error'"
                )
        if not isinstance(self.refusal, str) or not self.refusal:
            raise ConfigError(f"refusal={self.refusal!r:.80}: a non-empty string is needed")
        for option in ("pass_headers", "pass_unread"):
            names = getattr(self, option)
            if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
                raise ConfigError(f"{option}={names!r:.80}: a tuple of str is needed")
        for name in self.pass_headers:
            if not _HEADER.fullmatch(name) or name in _OWN_HEADERS:
                raise ConfigError(
                    f"pass_headers has {name!r:.80}: a header's name in lower case is needed, and none that the proxy "
                    "sets itself or that belongs to one connection"
                )
        if "messages" in self.pass_unread:
            raise ConfigError("pass_unread has 'messages': without them there is nothing to moderate")
        if self.upstream_key is not None and not _KEY.fullmatch(self.upstream_key):
            raise ConfigError("the upstream's key: printable ASCII characters without spaces are needed")
        if self.forward_authorization and (self.upstream_key is not None or self.server.api_keys):
            raise ConfigError(
                "forward_authorization passes the clients' own keys on; it cannot be combined with a key for the "
                "upstream, nor with API keys for this proxy, which would be passed on"
            )


def _checked_address(address: str) -> str:
    """The address without /v1 and a slash at its end."""
    mend = "; an address such as http://localhost:8001 is needed"
    if not isinstance(address, str) or not address.isascii() or any(c.isspace() for c in address):
        raise ConfigError(f"upstream={address!r:.200}{mend}")
    try:
        parts = urlsplit(address)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise ConfigError(f"upstream={address!r:.200}{mend}") from None
    if parts.username is not None or parts.password is not None:
        raise ConfigError("upstream has a user or a password in it; use the upstream's key file")
    if parts.scheme not in ("http", "https") or not has_host or parts.query or parts.fragment:
        raise ConfigError(f"upstream={address!r:.200}{mend}")
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/").removesuffix("/v1").rstrip("/")
