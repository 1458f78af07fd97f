"""Upstream: the LLM's server. One address, no redirects, no compression, only headers that are on a list."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx
from starlette.requests import Request

from guardengine._version import __version__
from guardengine.proxy.errors import UpstreamError, broken
from guardengine.proxy.events import Event, EventReader
from guardengine.proxy.settings import ProxySettings
from guardengine.server.refusals import Refusal

_RETURNED = re.compile(r"x-request-id|retry-after(-ms)?|openai-processing-ms|x-ratelimit-[a-z-]{1,60}")
_MAX_ERROR_BYTES = 2**16


class Upstream:
    """Connections to it, for one event loop."""

    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(
                settings.upstream_timeout_s,
                connect=settings.connect_timeout_s,
                pool=settings.connect_timeout_s,
            ),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
            follow_redirects=False,
            trust_env=False,  # no proxies and no .netrc of whoever starts this
        )

    async def close(self) -> None:
        await self._http.aclose()

    def headers(self, request: Request) -> dict[str, str]:
        """Those that go up with a client's request. Raises Refusal, 400, for one that is there twice."""
        settings, found = self._settings, dict[str, str]()
        names = [*settings.pass_headers, *(["authorization"] if settings.forward_authorization else [])]
        for name in names:
            values = request.headers.getlist(name)
            if len(values) > 1:
                raise Refusal(400, f"the header {name} is there twice", "invalid_header")
            if values:
                found[name] = values[0]
        if settings.upstream_key is not None:
            found["authorization"] = f"Bearer {settings.upstream_key}"
        return found | {"accept-encoding": "identity", "user-agent": f"guardengine-proxy/{__version__}"}

    @asynccontextmanager
    async def asked(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None
    ) -> AsyncIterator[httpx.Response]:
        """The upstream's answer, of which only the head has come. The connection is closed at the end where it was not
        read to its end. Raises UpstreamError."""
        own = {"accept": "application/json, text/event-stream"}
        if body is not None:
            own["content-type"] = "application/json"
        address = f"{self._settings.upstream}{path}"
        try:
            async with self._http.stream(
                method, address, headers={**headers, **own}, content=body
            ) as response:
                self._check(response)
                yield response
        except httpx.HTTPError as error:
            raise _named(error, self._settings) from None

    def _check(self, response: httpx.Response) -> None:
        if 300 <= response.status_code < 400:
            raise broken(f"a redirect ({response.status_code}), and none is followed")
        if response.status_code in (401, 403) and self._settings.upstream_key is not None:
            raise UpstreamError(
                f"the upstream refuses the proxy's own key ({response.status_code}); see --upstream-key-file",
                "upstream_refused",
            )
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise broken("a compressed answer, which was not asked for")

    async def events(self, response: httpx.Response) -> AsyncIterator[Event]:
        """The server-sent events of an answer. Raises UpstreamError."""
        reader = EventReader(self._settings.max_event_bytes)
        try:
            async for chunk in response.aiter_raw():
                for event in reader.add(chunk):
                    yield event
            for event in reader.finish():
                yield event
        except httpx.HTTPError as error:
            raise _named(error, self._settings) from None

    async def whole(self, response: httpx.Response, max_bytes: int | None = None) -> bytes:
        """All of an answer's body. Raises UpstreamError for one that is too large."""
        most = self._settings.max_reply_bytes if max_bytes is None else max_bytes
        body = bytearray()
        try:
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > most:
                    raise broken(f"an answer larger than {most} bytes")
        except httpx.HTTPError as error:
            raise _named(error, self._settings) from None
        return bytes(body)

    async def error_of(self, response: httpx.Response) -> bytes:
        """The body of an answer that is an error, for the client. Raises UpstreamError for what is none in JSON."""
        body = await self.whole(response, _MAX_ERROR_BYTES)
        key = self._settings.upstream_key
        if media_type(response) != "application/json" or (key is not None and key.encode() in body):
            raise UpstreamError(f"the upstream answers with status {response.status_code}", "upstream_failed")
        return body


def media_type(response: httpx.Response) -> str:
    return response.headers.get("content-type", "").partition(";")[0].strip().lower()  # type: ignore[no-any-return]


def returned(response: httpx.Response) -> dict[str, str]:
    """The headers of an answer that the client sees."""
    return {
        name: value
        for name, value in response.headers.items()
        if _RETURNED.fullmatch(name) and value.isascii() and value.isprintable()
    }


def _named(error: httpx.HTTPError, settings: ProxySettings) -> UpstreamError:
    """Without the error's message, which may have the address."""
    match error:
        case httpx.ConnectTimeout() | httpx.PoolTimeout():
            return UpstreamError(
                f"the upstream does not take a connection within connect_timeout_s={settings.connect_timeout_s:g}",
                "upstream_timeout",
                status=504,
            )
        case httpx.TimeoutException():
            return UpstreamError(
                f"the upstream was silent for upstream_timeout_s={settings.upstream_timeout_s:g}",
                "upstream_timeout",
                status=504,
            )
        case httpx.ConnectError():
            return UpstreamError("the upstream cannot be reached", "upstream_unreachable")
        case httpx.RemoteProtocolError():
            return UpstreamError(
                "the upstream's connection ended early, or it does not speak HTTP", "upstream_truncated"
            )
    return UpstreamError(f"the connection to the upstream failed ({type(error).__name__})", "upstream_failed")
