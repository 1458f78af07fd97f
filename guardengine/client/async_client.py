"""AsyncGuardClient: moderations, whole conversations and streams on a server, for asyncio."""

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
    """A client of `guardengine serve`, for one event loop. Also an async context manager that closes it.

    Attributes:
        address: The server's address and key.
        timeout_s: Seconds that each answer may take.
        reconnect_s: Seconds during which a stream whose connection was lost tries to connect again.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        reconnect_s: float = 30.0,
    ) -> None:
        """Make a client. Nothing is sent yet.

        Args:
            url: The address of a running `guardengine serve`, such as "http://127.0.0.1:8000". A trailing "/v1" is
                dropped.
            api_key: A key that the server accepts, if it asks for one.
            timeout_s: Seconds that each answer may take.
            reconnect_s: Seconds during which a stream whose connection was lost tries to connect again.

        Raises:
            ConfigError: The url is not an http or https URL.
        """
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
        """Judge texts as prompts, by POST /v1/moderations.

        Args:
            text: One text, or several.
            taxonomy: The names of categories in the answer: "qwen" or "openai". None: the server's default.
            policy: Options of `guardengine.Policy`, with "preset": "strict" or "loose" beside them. None: the server's
                policy.

        Returns:
            One result for each text, in order: the objects of "results" in the server's answer.

        Raises:
            InvalidText: The text is not valid Unicode.
            StreamTooLong: The text does not fit into the model's context.
            ConfigError: The server refuses an option.
            Overloaded: The server has no room for the request now.
            ServerError: The server cannot be reached, or it fails.
        """
        answer = await self._post("/v1/moderations", moderations_body(text, taxonomy, policy))
        return answer["results"]  # type: ignore[no-any-return]

    async def guard(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        policy: Mapping[str, Any] | None = None,
        labels: str | None = None,
        timeout_s: float | None = None,
    ) -> Json:
        """Judge a whole conversation, by POST /v1/guard.

        Args:
            messages: Objects with "role" and "content". When the last is the assistant's, it is judged as the
                response.
            policy: Options of `guardengine.Policy`, with "preset": "strict" or "loose" beside them. None: the server's
                policy.
            labels: Which labels of the response the answer has: "all", "flagged" or "none". None: the server's
                default.
            timeout_s: Seconds within which the server must judge; what it does not judge in time, the policy decides.

        Returns:
            The server's answer, as in its API documentation.

        Raises:
            InvalidText: The text is not valid Unicode.
            StreamTooLong: The text does not fit into the model's context.
            ConfigError: The server refuses an option.
            Overloaded: The server has no room for the request now.
            ServerError: The server cannot be reached, or it fails.
        """
        return await self._post("/v1/guard", guard_body(messages, policy, labels, timeout_s))

    async def stream(
        self, messages: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> AsyncGuardStream:
        """Open a stream and wait for the label of its prompt.

        Args:
            messages: The conversation so far, objects with "role" and "content". A last message of the assistant is
                the beginning of the reply. Either this or `token_ids`.
            **options: The other fields of "open" in docs/serving/protocol.md: token_ids, role, policy, labels, scores,
                priority, cache_salt, timeout_s.

        Returns:
            The open stream; its `prompt` is the label.

        Raises:
            InvalidText: The text is not valid Unicode.
            StreamTooLong: The text does not fit into the model's context.
            ConfigError: The server refuses an option.
            Overloaded: The server has no room for the request now.
            ServerError: The server cannot be reached, or it fails.
        """
        return await AsyncGuardStream(self, Conversation(messages, **options))._opened()

    async def close(self) -> None:
        """Close the connections of `moderations` and `guard`. Streams have their own: close them too."""
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

    When the connection is lost, the stream continues on a new one: no label is lost or repeated. Made by
    `AsyncGuardClient.stream`.

    Attributes:
        conversation: What was sent and received so far. `prompt`, `labels`, `verdict` and `cleared_chars` read from
            it.
        is_closed: Whether the stream is closed.
    """

    def __init__(self, client: AsyncGuardClient, conversation: Conversation) -> None:
        self._client, self.conversation = client, conversation
        self._socket: ClientConnection | None = None
        self._turn = asyncio.Lock()
        self.is_closed = False

    async def append(
        self, text: str | None = None, *, token_ids: Sequence[int] | None = None, role: str = "assistant"
    ) -> Update:
        """Feed more of the reply, and wait until it is judged.

        Text whose tokens may still change with what follows is held back by the server until more comes, or `finish`.
        When a call is cancelled the stream is closed, because it is not known whether the text has reached the server.

        Args:
            text: More text. Either this or `token_ids`.
            token_ids: Ids of Qwen3's tokenizer.
            role: "assistant" for more of the reply, "user" for a further user turn.

        Returns:
            The new labels, and the verdict after them.

        Raises:
            ConfigError: Both of text and token_ids were given, or neither.
            StreamClosed: The stream is closed.
            StreamTooLong: The text does not fit into the model's context.
            Overloaded: The server has no room now. Nothing was fed; try again later.
            ServerError: The server cannot be reached any more, or it fails.
        """
        if (text is None) == (token_ids is None):
            raise ConfigError("append() needs either text or token_ids: pass exactly one of them")
        return await self._do(lambda: self.conversation.append(text, token_ids, role))

    async def finish(self) -> Update:
        """End the reply: judge the text that is held back, and the end itself.

        Returns:
            The new labels, and the verdict on the whole reply.

        Raises:
            StreamClosed: The stream is closed.
            Overloaded: The server has no room now. Nothing was fed; try again later.
            ServerError: The server cannot be reached any more, or it fails.
        """
        return await self._do(self.conversation.finish)

    async def rollback(self, num_tokens: int) -> Update:
        """Drop the newest tokens with their labels, and with every decision that rests on them.

        Args:
            num_tokens: How many tokens to drop. Text that is held back is dropped as well.

        Returns:
            No labels, and the verdict after the remaining tokens.

        Raises:
            InvalidTokens: The stream does not have so many tokens to drop.
            StreamClosed: The stream is closed.
            ServerError: The server cannot be reached any more, or it fails.
        """
        return await self._do(lambda: self.conversation.rollback(num_tokens))

    async def fork(self) -> AsyncGuardStream:
        """Open a second stream with the same history, which goes on independently. The server reuses what it has
        computed.

        Returns:
            The new stream, on a connection of its own.

        Raises:
            Overloaded: The server has no room for another stream.
            ServerError: The server cannot be reached, or it fails.
        """
        return await AsyncGuardStream(self._client, self.conversation.copy())._opened()

    async def close(self) -> None:
        """Close the stream and its connection. The server frees its memory."""
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
        """Open the first connection and return self."""
        try:
            await self._reopen()
        except BaseException:  # cancelled, or refused: nobody else can close it
            await self.close()
            raise
        return self

    async def _reopen(self) -> None:
        """Open the stream on a new connection, with its history. Tries again until `reconnect_s` is over."""
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
        """Receive events until the one that ends the operation."""
        if self._socket is None:
            raise OSError("not connected")
        async with asyncio.timeout(self._client.timeout_s):
            while True:
                event = json.loads(await self._socket.recv())
                self.conversation.receive(event)
                if self.conversation.is_last(event):
                    return


def handshake_error(error: BaseException) -> GuardEngineError | None:
    """The error that a server gave when it refused the connection itself, None for other errors."""
    if not isinstance(error, websockets.InvalidStatus):
        return None
    try:
        return error_of(json.loads(error.response.body or b""), error.response.status_code)
    except ValueError:
        return None
