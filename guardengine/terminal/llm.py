"""Upstream: the LLM that `guardengine chat` guards, behind OpenAI's chat completions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import httpx
from httpx_sse import aconnect_sse

from guardengine.client.requests import Address
from guardengine.errors import ServerError
from guardengine.integrations.openai import delta_text

_CONNECT_S, _SILENCE_S = 10.0, 300.0
_LONGEST_SHOWN = 300  # of what it says is wrong


class Upstream:
    """A server with OpenAI's API at `url`, with or without /v1, and one of its models. Also an async context manager.

    Raises ConfigError for a bad url.
    """

    def __init__(self, url: str, model: str, api_key: str | None = None) -> None:
        self.model, self._address = model, Address(url, api_key)
        timeout = httpx.Timeout(_SILENCE_S, connect=_CONNECT_S)
        self._http = httpx.AsyncClient(headers=self._address.headers, timeout=timeout)

    async def deltas(self, messages: Sequence[Mapping[str, str]]) -> AsyncIterator[str]:
        """The reply's text as it is written. Closing this early stops it. Raises ServerError where the server cannot be
        reached, refuses, or breaks off."""
        url = f"{self._address.url}/v1/chat/completions"
        body = {"model": self.model, "messages": list(messages), "stream": True}
        try:
            async with aconnect_sse(self._http, "POST", url, json=body) as source:
                if source.response.status_code != 200:
                    raise await self._refusal(source.response)
                async for event in source.aiter_sse():
                    if event.data == "[DONE]":
                        return
                    if text := delta_text(self._chunk(event.data)):
                        yield text
        except httpx.HTTPError as error:
            raise self._error(
                f"cannot be reached or broke off ({type(error).__name__}); is it running, and --upstream its address?"
            ) from None
        raise self._error("broke off: its reply has no end")

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Upstream:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    def _chunk(self, data: str) -> dict[str, Any]:
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            chunk = None
        if not isinstance(chunk, dict):
            raise self._error("sent an event that is no JSON object")
        if "error" in chunk:
            raise self._error(f"failed: {_message(chunk)}")
        return chunk

    async def _refusal(self, response: httpx.Response) -> ServerError:
        try:
            said = _message(json.loads(await response.aread()))
        except (ValueError, RecursionError):
            said = ""
        mends = {401: "see --upstream-key-file", 404: "is --model one of its models?"}
        mend = mends.get(response.status_code, "")
        return self._error(
            ": ".join(filter(None, (f"answered with status {response.status_code}", said, mend)))
        )

    def _error(self, what: str) -> ServerError:
        return ServerError(f"the upstream {self._address.url} {what}")


def _message(envelope: Any) -> str:
    error = envelope.get("error") if isinstance(envelope, dict) else None
    found = error.get("message") if isinstance(error, dict) else error
    return "" if found is None else str(found)[:_LONGEST_SHOWN]
