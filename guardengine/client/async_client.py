"""AsyncGuardClient: a server's moderations, guard and streams for asyncio."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import websockets
from websockets.asyncio.client import ClientConnection, connect

from guardengine.client.conversation import PROTOCOL, Conversation, ConversationView, Update
from guardengine.client.requests import (
    Address,
    Json,
    error_of,
    guard_body,
    json_of,
    moderations_body,
)
from guardengine.errors import ConfigError, GuardEngineError, Overloaded, ServerError, StreamClosed

_LOST = (OSError, websockets.ConnectionClosed, websockets.InvalidHandshake, TimeoutError)


class AsyncGuardClient:
    """`guardengine serve` at `url`, for one event loop. Also an async context manager.

    timeout_s: for every answer. reconnect_s: for how long a stream whose connection was lost tries to get another one.
    Raises ConfigError for a bad url; all calls raise the engine's errors (InvalidText, Overloaded, ...), and
    ServerError where the server cannot be reached or fails.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        reconnect_s: float = 30.0,
    ) -> None:
        self.address, self.timeout_s, self.reconnect_s = Address(url, api_key), timeout_s, reconnect_s
        self._http = httpx.AsyncClient(
            base_url=self.address.url, headers=self.address.headers, timeout=timeout_s
        )

    async def moderations(
        self,
        text: str | Sequence[str],
        *,
        taxonomy: str | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> list[Json]:
        """Judge texts as prompts; a result each, as POST /v1/moderations has them."""
        found = await self._post("/v1/moderations", moderations_body(text, taxonomy, policy))
        return found["results"]  # type: ignore[no-any-return]

    async def guard(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        policy: Mapping[str, Any] | None = None,
        labels: str | None = None,
        timeout_s: float | None = None,
    ) -> Json:
        """Judge a whole conversation: the answer of POST /v1/guard."""
        return await self._post("/v1/guard", guard_body(messages, policy, labels, timeout_s))

    async def stream(
        self, messages: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> AsyncGuardStream:
        """Open a stream and wait for the label of its prompt. options: token_ids, policy, labels, scores, priority,
        as `open` in docs/PROTOCOL.md."""
        return await AsyncGuardStream(self, Conversation(messages, **options))._opened()

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncGuardClient:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    async def _post(self, path: str, body: Json) -> Json:
        try:
            response = await self._http.post(path, json=body)
        except httpx.HTTPError as error:
            raise ServerError(f"{self.address.url} cannot be reached: {type(error).__name__}") from None
        return json_of(response.status_code, response.json)


class AsyncGuardStream(ConversationView):
    """A stream of an AsyncGuardClient, on a connection of its own. Also an async context manager that closes it.

    When the connection is lost it goes on with another one. `prompt`, `labels`, `verdict` and `cleared_chars` are those
    of `conversation`.
    """

    def __init__(self, client: AsyncGuardClient, conversation: Conversation) -> None:
        self._client, self.conversation = client, conversation
        self._socket: ClientConnection | None = None
        self._turn = asyncio.Lock()
        self.is_closed = False

    async def append(
        self, text: str | None = None, *, token_ids: Sequence[int] | None = None, role: str = "assistant"
    ) -> Update:
        """Feed more of the reply (or, role "user", a further turn), and wait until it is judged.

        Cancelled, the stream must be closed: whether the text went over is not known.
        """
        if (text is None) == (token_ids is None):
            raise ConfigError("append() needs either text or token_ids")
        return await self._do(lambda: self.conversation.append(text, token_ids, role))

    async def finish(self) -> Update:
        """Judge what is held back and the reply's end."""
        return await self._do(self.conversation.finish)

    async def rollback(self, num_tokens: int) -> Update:
        """Drop the last tokens of the reply with their labels."""
        return await self._do(lambda: self.conversation.rollback(num_tokens))

    async def fork(self) -> AsyncGuardStream:
        """A stream with the same past. The server finds it in its prefix cache."""
        return await AsyncGuardStream(self._client, self.conversation.copy())._opened()

    async def close(self) -> None:
        self.is_closed = True
        if self._socket is not None:
            await self._socket.close()

    async def __aenter__(self) -> AsyncGuardStream:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    async def _do(self, operation: Any) -> Update:
        async with self._turn:
            if self.is_closed:
                raise StreamClosed("this stream has been closed; open another one")
            conversation = self.conversation
            before, frame = len(conversation.labels), operation()
            try:
                try:
                    await self._send(frame)
                    await self._until_done()
                except (*_LOST, StreamClosed):
                    await self._reopen()
            except GuardEngineError:
                conversation.undo()
                raise
            except BaseException:  # cancelled in the middle
                await self.close()
                raise
            if frame["type"] == "rollback":
                before = len(conversation.labels)
            conversation.merge()
            return conversation.update(before)

    async def _opened(self) -> AsyncGuardStream:
        """Itself, on its first connection."""
        try:
            await self._reopen()
        except BaseException:  # cancelled, or refused: nobody else can close it
            await self.close()
            raise
        return self

    async def _reopen(self) -> None:
        """Open the stream on a new connection, with its past."""
        until, nap = asyncio.get_running_loop().time() + self._client.reconnect_s, 0.05
        while True:
            try:
                await self._connect()
                return
            except (*_LOST, Overloaded) as error:
                if self._socket is not None:
                    await self._socket.close()
                refusal = handshake_error(error)
                if refusal is not None and not isinstance(refusal, Overloaded):
                    raise refusal from None
                if asyncio.get_running_loop().time() + nap > until:
                    if isinstance(refusal or error, Overloaded):
                        raise refusal or error from None
                    raise ServerError(
                        f"{self._client.address.url} cannot be reached: {type(error).__name__}"
                    ) from None
                await asyncio.sleep(nap)
                nap = min(2 * nap, 2.0)

    async def _connect(self) -> None:
        address = self._client.address
        self._socket = await connect(
            address.websocket,
            additional_headers=address.headers,
            subprotocols=[websockets.Subprotocol(PROTOCOL)],
            compression=None,
            max_size=None,
            open_timeout=self._client.timeout_s,
        )
        await self._send(self.conversation.open_frame())
        await self._until_done()

    async def _send(self, frame: Json) -> None:
        if self._socket is None:
            raise OSError("not connected")
        await self._socket.send(json.dumps(frame))

    async def _until_done(self) -> None:
        """Take events in until what was sent is done."""
        if self._socket is None:
            raise OSError("not connected")
        async with asyncio.timeout(self._client.timeout_s):
            while True:
                event = json.loads(await self._socket.recv())
                self.conversation.receive(event)
                if self.conversation.is_last(event):
                    return


def handshake_error(error: BaseException) -> GuardEngineError | None:
    """What a server said that refused the connection itself."""
    if not isinstance(error, websockets.InvalidStatus):
        return None
    try:
        return error_of(json.loads(error.response.body or b""), error.response.status_code)
    except ValueError:
        return None
