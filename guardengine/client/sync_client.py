"""GuardClient: a server's moderations, guard and streams, for code without asyncio."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import websockets
from websockets.sync.client import ClientConnection, connect

from guardengine.client.async_client import handshake_error
from guardengine.client.conversation import PROTOCOL, Conversation, ConversationView, Update
from guardengine.client.requests import Address, Json, guard_body, json_of, moderations_body
from guardengine.errors import ConfigError, GuardEngineError, Overloaded, ServerError, StreamClosed

_LOST = (OSError, websockets.ConnectionClosed, websockets.InvalidHandshake, TimeoutError)


class GuardClient:
    """`guardengine serve` at `url`. Also a context manager. As AsyncGuardClient, without await; moderations and guard
    may be called from many threads at once, a stream from one at a time."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        reconnect_s: float = 30.0,
    ) -> None:
        self.address, self.timeout_s, self.reconnect_s = Address(url, api_key), timeout_s, reconnect_s
        self._http = httpx.Client(base_url=self.address.url, headers=self.address.headers, timeout=timeout_s)

    def moderations(
        self,
        text: str | Sequence[str],
        *,
        taxonomy: str | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> list[Json]:
        """Judge texts as prompts; a result each, as POST /v1/moderations has them."""
        found = self._post("/v1/moderations", moderations_body(text, taxonomy, policy))
        return found["results"]  # type: ignore[no-any-return]

    def guard(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        policy: Mapping[str, Any] | None = None,
        labels: str | None = None,
        timeout_s: float | None = None,
    ) -> Json:
        """Judge a whole conversation: the answer of POST /v1/guard."""
        return self._post("/v1/guard", guard_body(messages, policy, labels, timeout_s))

    def stream(self, messages: Sequence[Mapping[str, Any]] | None = None, **options: Any) -> GuardStream:
        """Open a stream and wait for the label of its prompt. options: token_ids, policy, labels, scores, priority,
        as `open` in docs/PROTOCOL.md."""
        stream = GuardStream(self, Conversation(messages, **options))
        stream._reopen()
        return stream

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> GuardClient:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _post(self, path: str, body: Json) -> Json:
        try:
            response = self._http.post(path, json=body)
        except httpx.HTTPError as error:
            raise ServerError(f"{self.address.url} cannot be reached: {type(error).__name__}") from None
        return json_of(response.status_code, response.json)


class GuardStream(ConversationView):
    """A stream of a GuardClient, on a connection of its own. Also a context manager that closes it.

    When the connection is lost it goes on with another one. `prompt`, `labels`, `verdict` and `cleared_chars` are those
    of `conversation`.
    """

    def __init__(self, client: GuardClient, conversation: Conversation) -> None:
        self._client, self.conversation = client, conversation
        self._socket: ClientConnection | None = None
        self._connection = contextlib.ExitStack()  # that closes it
        self.is_closed = False

    def append(
        self, text: str | None = None, *, token_ids: Sequence[int] | None = None, role: str = "assistant"
    ) -> Update:
        """Feed more of the reply (or, role "user", a further turn), and wait until it is judged."""
        if (text is None) == (token_ids is None):
            raise ConfigError("append() needs either text or token_ids")
        return self._do(lambda: self.conversation.append(text, token_ids, role))

    def finish(self) -> Update:
        """Judge what is held back and the reply's end."""
        return self._do(self.conversation.finish)

    def rollback(self, num_tokens: int) -> Update:
        """Drop the last tokens of the reply with their labels."""
        return self._do(lambda: self.conversation.rollback(num_tokens))

    def fork(self) -> GuardStream:
        """A stream with the same past. The server finds it in its prefix cache."""
        branch = GuardStream(self._client, self.conversation.copy())
        branch._reopen()
        return branch

    def close(self) -> None:
        self.is_closed = True
        self._connection.close()

    def __enter__(self) -> GuardStream:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _do(self, operation: Callable[[], Json]) -> Update:
        if self.is_closed:
            raise StreamClosed("this stream has been closed; open another one")
        conversation = self.conversation
        before, frame = len(conversation.labels), operation()
        try:
            try:
                self._send(frame)
                self._until_done()
            except (*_LOST, StreamClosed):
                self._reopen()
        except GuardEngineError:
            conversation.undo()
            raise
        except BaseException:  # interrupted in the middle
            self.close()
            raise
        if frame["type"] == "rollback":
            before = len(conversation.labels)
        conversation.merge()
        return conversation.update(before)

    def _reopen(self) -> None:
        """Open the stream on a new connection, with its past."""
        until, nap = time.monotonic() + self._client.reconnect_s, 0.05
        while True:
            try:
                self._connect()
                return
            except (*_LOST, Overloaded) as error:
                self._connection.close()
                refusal = handshake_error(error)
                if refusal is not None and not isinstance(refusal, Overloaded):
                    raise refusal from None
                if time.monotonic() + nap > until:
                    if isinstance(refusal or error, Overloaded):
                        raise refusal or error from None
                    raise ServerError(
                        f"{self._client.address.url} cannot be reached: {type(error).__name__}"
                    ) from None
                time.sleep(nap)
                nap = min(2 * nap, 2.0)

    def _connect(self) -> None:
        address = self._client.address
        self._connection.close()
        self._socket = self._connection.enter_context(
            connect(
                address.websocket,
                additional_headers=address.headers,
                subprotocols=[websockets.Subprotocol(PROTOCOL)],
                compression=None,
                max_size=None,
                open_timeout=self._client.timeout_s,
            )
        )
        self._send(self.conversation.open_frame())
        self._until_done()

    def _send(self, frame: Json) -> None:
        if self._socket is None:
            raise OSError("not connected")
        self._socket.send(json.dumps(frame))

    def _until_done(self) -> None:
        """Take events in until what was sent is done."""
        if self._socket is None:
            raise OSError("not connected")
        until = time.monotonic() + self._client.timeout_s
        while True:
            event = json.loads(self._socket.recv(timeout=max(0.0, until - time.monotonic())))
            self.conversation.receive(event)
            if self.conversation.is_last(event):
                return
