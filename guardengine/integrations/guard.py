"""Guard: who judges for a host that holds conversations: `guardengine serve`, or an AsyncEngine in this process.

Both are asked alike, so an adapter is written once. `show` is `guarded` for a host's own items (chunks, messages) with
either of them.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from guardengine.errors import Blocked, ConfigError, Overloaded, ServerError
from guardengine.guarding.held import HeldItems, Split
from guardengine.guarding.pull_ahead import MAX_AHEAD, PullAhead
from guardengine.guarding.relay import relay
from guardengine.integrations.judges import EngineJudge, Judge, JudgedStream, Messages, ServerJudge
from guardengine.labels import Verdict
from guardengine.policy import OnFailure, Policy

if TYPE_CHECKING:  # which brings torch: who asks a server does not need it
    from guardengine.engine.async_engine import AsyncEngine

T = TypeVar("T")

_LOG = logging.getLogger(__name__)


class Guard:
    """Judges a host's conversations. Give one of `url`, `engine` and `checkpoint`.

    All calls raise InvalidText or StreamTooLong for conversations that cannot be judged, whatever `on_unreachable`
    says.

    Args:
        url: of a `guardengine serve`. Needs the extra `client`, and no torch. Every conversation has a connection of
            its own, so calls may come from any event loop.
        api_key: one of the server's keys, where it has some.
        engine: an AsyncEngine, for one event loop, as ever. The guard does not close it.
        checkpoint: a folder or hub id: loads an AsyncEngine in a thread; the first call waits for it.
        engine_options: of `AsyncEngine.from_pretrained`, with a checkpoint.
        policy: a Policy (not with a url), or its options as a dict with "preset": "strict" or "loose" beside them, as
            docs/serving/protocol.md has them. None: strict, or what the server was started with.
        timeout_s: seconds, for an answer; with an engine see Policy.on_timeout.
        reconnect_s: seconds for which a lost server is sought.
        on_unreachable: what becomes of conversations while the server cannot be reached, fails or refuses for lack of
            room (with an engine: the last). "closed" raises ServerError or Overloaded; "open" lets them pass: the
            verdict's rule is then "unreachable-open", and every one is logged as critical.

    Raises:
        ConfigError: for options that contradict each other or are out of range.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        engine: AsyncEngine | None = None,
        checkpoint: str | None = None,
        engine_options: Mapping[str, Any] | None = None,
        policy: Policy | Mapping[str, Any] | None = None,
        timeout_s: float = 10.0,
        reconnect_s: float = 2.0,
        on_unreachable: OnFailure = "closed",
    ) -> None:
        if sum(each is not None for each in (url, engine, checkpoint)) != 1:
            raise ConfigError("a guard needs one of url, engine and checkpoint")
        if on_unreachable not in ("closed", "open"):
            raise ConfigError(f"on_unreachable={on_unreachable!r}: choose 'closed' or 'open'")
        self.timeout_s, self.on_unreachable = timeout_s, on_unreachable
        self._judge: Judge
        if url is not None:
            self._judge = ServerJudge(
                url, api_key=api_key, policy=policy, timeout_s=timeout_s, reconnect_s=reconnect_s
            )
        elif checkpoint is not None:
            self._judge = EngineJudge.load(checkpoint, engine_options, policy=policy, timeout_s=timeout_s)
        else:
            self._judge = EngineJudge(cast("AsyncEngine", engine), policy=policy, timeout_s=timeout_s)

    async def judge(self, messages: Messages, reply: str | None = None) -> Verdict:
        """Judge a whole conversation.

        Args:
            messages: with text as content.
            reply: to the conversation; or the end of one, where the conversation ends with the assistant. None: there
                is none, and the prompt alone is judged.

        Returns:
            The verdict on all of it.

        Raises:
            InvalidText, StreamTooLong: the conversation cannot be judged.
            ServerError, Overloaded: with on_unreachable="closed".
        """
        async with await self.open(messages) as stream:
            if reply is not None and not stream.is_blocked:
                await stream.append(reply)
                await stream.finish()
            return stream.verdict

    async def open(self, messages: Messages) -> GuardedConversation:
        """Judge a prompt, and keep its conversation open for the reply.

        Args:
            messages: with text as content. What the assistant has begun to say in the last one is judged with the
                reply.

        Returns:
            A conversation to append to, which is also an async context manager that closes it.

        Raises:
            InvalidText, StreamTooLong: the conversation cannot be judged.
            ServerError, Overloaded: with on_unreachable="closed".
        """
        messages, begun = _without_beginning(messages)
        conversation = GuardedConversation(self._judge, messages, self.on_unreachable, len(begun))
        try:
            await conversation.start()
            if begun and not conversation.is_blocked:
                await conversation.append(begun)
        except BaseException:
            await conversation.close()
            raise
        return conversation

    async def show(
        self,
        source: AsyncIterable[T],
        messages: Messages,
        *,
        text: Callable[[T], str | None],
        split: Split[T] | None = None,
        check_prompt: Literal["first", "beside"] = "first",
    ) -> AsyncGenerator[T, None]:
        """Feed a host's items to the guard and yield those whose text is cleared, as they came and in their order.

        Args:
            source: the items. It is closed at the end, on a block, on an error, and when this generator is closed.
            messages: as in `open`.
            text: an item's text, None or "" where it has none; such an item comes out after the text before it.
            split: cuts an item after so many characters of its text into two, or returns None where it cannot be cut;
                it waits then until it is cleared as a whole. None: no item is cut.
            check_prompt: "first": nothing is pulled from the source before the prompt is judged. "beside": pulling
                begins at once, showing does not.

        Yields:
            Items, and parts of items.

        Raises:
            Blocked: the prompt or the reply is blocked; after what was cleared before.
            InvalidText, StreamTooLong: the conversation cannot be judged.
            ServerError, Overloaded: with on_unreachable="closed".
        """
        ahead = PullAhead(source, MAX_AHEAD)
        try:
            if check_prompt == "beside":
                ahead.start()
            async with await self.open(messages) as conversation:
                if not conversation.is_blocked:
                    reply = _Reply(conversation, text, split)
                    async with aclosing(relay(ahead, reply)) as shown:
                        async for item in shown:
                            yield item
                if conversation.is_blocked:
                    # The LLM need not wait until somebody has heard of it.
                    await ahead.close()
                    raise Blocked.by(conversation.verdict)
        finally:
            await ahead.close()

    async def close(self) -> None:
        """Close the client, or the engine that was loaded for a `checkpoint`. Others stay open."""
        await self._judge.close()


class GuardedConversation:
    """A conversation under a Guard. Made by `Guard.open`."""

    def __init__(self, judge: Judge, messages: Messages, on_unreachable: OnFailure, num_begun: int) -> None:
        self._judge, self._messages, self._on_unreachable = judge, messages, on_unreachable
        self._num_begun = num_begun  # characters of the reply that are not the appender's
        self._num_chars = 0  # appended, those included
        self._stream: JudgedStream | None = None
        self._is_unguarded = False
        self._resources = AsyncExitStack()

    async def start(self) -> None:
        async def begin() -> None:
            self._stream = await self._judge.open(self._messages)
            self._resources.push_async_callback(self._stream.close)

        await self._do(begin)

    @property
    def verdict(self) -> Verdict:
        """What the policy makes of it by now."""
        known = self._stream.verdict if self._stream is not None else None
        if self._is_unguarded and (known is None or known.action != "block"):
            return Verdict("allow", "Safe", None, None, "unreachable-open", known.cleared if known else 0)
        if known is None:
            raise ConfigError("the conversation is not open")
        return known

    @property
    def is_blocked(self) -> bool:
        return self.verdict.action == "block"

    @property
    def cleared_chars(self) -> int:
        """How many characters that were appended may be shown."""
        if self._is_unguarded and not self.is_blocked:
            return self._num_chars - self._num_begun
        return max((self._stream.cleared_chars if self._stream else 0) - self._num_begun, 0)

    async def append(self, text: str) -> None:
        """Judge more of the reply."""
        self._num_chars += len(text)
        if text and self._stream is not None and not self._is_unguarded:
            stream = self._stream
            await self._do(lambda: stream.append(text))

    async def finish(self) -> None:
        """Judge what is held back, and the reply's end."""
        if self._stream is not None and not self._is_unguarded:
            await self._do(self._stream.finish)

    async def close(self) -> None:
        await self._resources.aclose()

    async def __aenter__(self) -> GuardedConversation:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    async def _do(self, operation: Callable[[], Awaitable[Any]]) -> None:
        try:
            await operation()
        except (ServerError, Overloaded) as error:
            if self._on_unreachable == "closed":
                raise
            _LOG.critical("a conversation goes on without a guard, as on_unreachable='open': %s", error)
            self._is_unguarded = True


class _Reply(Generic[T]):
    """A host's items on a conversation, for `relay`."""

    def __init__(
        self, conversation: GuardedConversation, text: Callable[[T], str | None], split: Split[T] | None
    ) -> None:
        self._conversation, self._text = conversation, text
        self._held = HeldItems(split)

    @property
    def is_blocked(self) -> bool:
        return self._conversation.is_blocked

    async def append(self, items: list[T]) -> None:
        texts = [self._text(item) or "" for item in items]
        for item, text in zip(items, texts, strict=True):
            self._held.add(item, len(text))
        await self._conversation.append("".join(texts))

    async def finish(self) -> None:
        await self._conversation.finish()

    def take(self) -> list[T]:
        return self._held.take(self._conversation.cleared_chars)

    def rest(self) -> list[T]:
        return self._held.rest()


def _without_beginning(messages: Messages) -> tuple[Messages, str]:
    """The messages before a reply that has begun, and what of it there is."""
    if len(messages) > 1 and messages[-1].get("role") == "assistant":
        return messages[:-1], messages[-1].get("content") or ""
    return messages, ""
