"""Who judges for the commands `moderate` and `chat`: a server, or an engine in this process. All answer alike."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

from guardengine.client.conversation import Update
from guardengine.client.requests import Json

Messages = Sequence[Mapping[str, Any]]


class Reply(Protocol):
    """A stream, of which the prompt is judged."""

    @property
    def prompt(self) -> Json | None: ...

    @property
    def verdict(self) -> Json: ...

    def append(self, text: str) -> Update: ...

    def finish(self) -> Update: ...


@contextmanager
def served(url: str, api_key: str | None, messages: Messages, policy: Mapping[str, Any]) -> Iterator[Reply]:
    """A stream on a server."""
    from guardengine.client import GuardClient

    with GuardClient(url, api_key=api_key) as client, client.stream(messages, policy=policy) as stream:
        yield stream


@contextmanager
def in_process(
    checkpoint: str, messages: Messages, policy: Mapping[str, Any], **options: Any
) -> Iterator[Reply]:
    """A stream of an engine that is loaded for it."""
    from guardengine.engine.engine import Engine

    with Engine.from_pretrained(checkpoint, **options) as engine:
        yield _OwnReply(engine, messages, _own_policy(policy))


def _own_policy(policy: Mapping[str, Any]) -> Any:
    from guardengine.policy import Policy

    return Policy.of(**policy)


class _OwnReply:
    def __init__(self, engine: Any, messages: Messages, policy: Any) -> None:
        self._engine = engine
        self._stream = engine.open(messages, policy=policy)
        engine.run()

    @property
    def prompt(self) -> Json | None:
        from guardengine.server.wire import prompt_json

        return prompt_json(self._stream.prompt_label)

    @property
    def verdict(self) -> Json:
        from guardengine.server.wire import verdict_json

        return verdict_json(self._stream.verdict)

    def append(self, text: str) -> Update:
        self._stream.append_text(text)
        return self._update()

    def finish(self) -> Update:
        self._stream.finish_text()
        return self._update()

    def _update(self) -> Update:
        from guardengine.server.wire import label_json

        stream = self._stream
        labels = [label_json(label, stream.span(label)) for label in self._engine.run()]
        return Update(labels, self.verdict, stream.cleared_chars, len(stream.held_text))


class AsyncReply(Protocol):
    """The same for asyncio."""

    @property
    def verdict(self) -> Json: ...

    async def append(self, text: str) -> Update: ...

    async def finish(self) -> Update: ...

    async def close(self) -> None: ...


Open = Callable[[Messages], Awaitable[AsyncReply]]  # returns when the prompt is judged


@asynccontextmanager
async def served_chat(url: str, api_key: str | None, policy: Mapping[str, Any]) -> AsyncIterator[Open]:
    """Streams on a server."""
    from guardengine.client import AsyncGuardClient

    async with AsyncGuardClient(url, api_key=api_key, reconnect_s=5.0) as client:

        async def opened(messages: Messages) -> AsyncReply:
            return await client.stream(messages, policy=policy, scores=False)

        yield opened


@asynccontextmanager
async def chat_in_process(checkpoint: str, policy: Mapping[str, Any], **options: Any) -> AsyncIterator[Open]:
    """Streams of an engine that is loaded for them."""
    from guardengine.engine.async_engine import AsyncEngine

    own = _own_policy(policy)
    async with AsyncEngine.from_pretrained(checkpoint, **options) as engine:

        async def opened(messages: Messages) -> AsyncReply:
            stream = await engine.open(messages, policy=own)
            await stream.prompt()
            return _OwnAsyncReply(stream)

        yield opened


class _OwnAsyncReply:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    @property
    def verdict(self) -> Json:
        from guardengine.server.wire import verdict_json

        return verdict_json(self._stream.verdict)

    async def append(self, text: str) -> Update:
        return self._update(await self._stream.append_text(text))

    async def finish(self) -> Update:
        return self._update(await self._stream.finish_text())

    async def close(self) -> None:
        await self._stream.close()

    def _update(self, labels: Sequence[Any]) -> Update:
        from guardengine.server.wire import label_json

        stream = self._stream
        shown = [label_json(label, stream.span(label), with_scores=False) for label in labels]
        return Update(shown, self.verdict, stream.cleared_chars, len(stream.held_text))
