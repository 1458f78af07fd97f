"""Who judges for `guardengine moderate`: a server, or an engine in this process. Both answer alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    from guardengine.engine import Engine
    from guardengine.policy import Policy

    settings = dict(policy)
    make = Policy.loose if settings.pop("preset", "strict") == "loose" else Policy.strict
    with Engine.from_pretrained(checkpoint, **options) as engine:
        yield _OwnReply(engine, messages, make(**settings))


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
