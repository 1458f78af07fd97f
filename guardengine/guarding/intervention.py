"""intervene(): a reply that is taken back and generated on in another way when it turns unsafe.

The detect, roll back and intervene loop of the Qwen3Guard Technical Report (arXiv 2510.14276), section 4.5: the reader
lags some tokens behind, so that there is something to take back.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from guardengine import checks
from guardengine.engine.async_stream import AsyncStream
from guardengine.errors import ConfigError
from guardengine.guarding.deltas import Extractor, Shape
from guardengine.guarding.feeding import AsyncReply, is_blocked
from guardengine.guarding.guarded import OnBlock, check_on_block, instead
from guardengine.guarding.pull_ahead import MAX_AHEAD, PullAhead
from guardengine.guarding.relay import relay
from guardengine.labels import Verdict

Kept = str | list[int] | None
Generate = Callable[[Kept, Any], AsyncIterable[Any] | Iterable[Any]]
Callback = Callable[[Verdict, Kept], Awaitable[Any] | Any]


def intervene(
    generate: Generate,
    stream: AsyncStream,
    *,
    callback: Callback,
    buffer_tokens: int = 40,
    max_retries: int = 5,
    text: Extractor | None = None,
    ids: Extractor | None = None,
    on_block: OnBlock = "stop",
    substitute: str | int | Sequence[int] | None = None,
    max_ahead: int = MAX_AHEAD,
    timeout_s: float | None = None,
    end_turn: bool = True,
) -> AsyncGenerator[Any, None]:
    """Yield a reply like `guarded`, but where it is blocked, take back what is not cleared and generate on.

    A token comes out when `buffer_tokens` newer ones are cleared, or at the end of a reply that is not blocked. So
    what came out is always the beginning of what is kept. Text is cut where a token ends with a character; what
    follows is tokenized as if it began there. Keys and values are those of the kept tokens, and no others are
    computed again.

    It is given up after `max_retries` callbacks, and at once when rolling back does not lift the block: the prompt's,
    or that of a failure which the policy does not let pass. What was kept and not shown stays hidden then, and
    `on_block` and `substitute` say what comes instead.

    Args:
        generate: called with (kept, guidance), returns the LLM's deltas from there on, as `guarded` takes them. kept:
            the reply so far, str or a list of ids, which the deltas continue; None at first. guidance: what `callback`
            returned, None at first.
        stream: nobody else may append to it meanwhile.
        callback: called with (verdict, kept) on a block, after the stream was rolled back to its last cleared token,
            with the verdict that blocked and what is kept. It may be async. What it returns (a hint for the LLM's
            context, say) is handed to `generate`.
        buffer_tokens: how many cleared tokens the reader lags behind; from 0.
        max_retries: how often `callback` is called, at most; from 0.
        text: takes a str, or None, from a delta. Of another tokenizer than Qwen3's pass the text, not the ids.
        ids: takes a list of Qwen3 ids, or None, from a delta.
        on_block: what follows when it is given up: "stop" ends the reply, "raise" raises Blocked.
        substitute: what comes out last when it is given up, as it is given.
        max_ahead: how many deltas are pulled before they are fed, at most; from 1.
        timeout_s: seconds, for each append, as in `AsyncStream.append`.
        end_turn: False leaves the reply open at its end.

    Returns:
        An async generator of deltas, as in `guarded`.

    Raises:
        ConfigError: at once, for options that contradict each other or are out of range.
        GuardEngineError: as `guarded`; and whatever `generate` and `callback` raise.
    """
    shape = Shape(text, ids)
    shape.check()
    check_on_block(on_block, substitute)
    if not isinstance(stream, AsyncStream):
        raise ConfigError(f"stream is {type(stream).__name__}, not an AsyncStream")
    for name, function in (("generate", generate), ("callback", callback)):
        if not callable(function):
            raise ConfigError(f"{name}={function!r:.80}: a function is needed")
    for name, count, least in (
        ("buffer_tokens", buffer_tokens, 0),
        ("max_retries", max_retries, 0),
        ("max_ahead", max_ahead, 1),
    ):
        checks.whole_number(name, count, least)

    async def run() -> AsyncGenerator[Any, None]:
        await stream.prompt()
        draft = _Draft(stream, shape, buffer_tokens, end_turn=end_turn, timeout_s=timeout_s)
        guidance: Any = None
        num_retries = 0
        while not is_blocked(stream):
            ahead = PullAhead(generate(draft.kept, guidance), max_ahead)
            async with aclosing(relay(ahead, draft)) as shown:
                async for delta in shown:
                    yield delta
            if not is_blocked(stream):
                return
            if num_retries == max_retries:
                break
            num_retries += 1
            verdict = stream.verdict
            await draft.roll_back()
            if is_blocked(stream):
                break
            guidance = callback(verdict, draft.kept)
            if inspect.isawaitable(guidance):
                guidance = await guidance
        for delta in instead(stream.verdict, on_block, substitute):
            yield delta

    return run()


class _Draft(AsyncReply):
    """A reply of which what was not shown may still be taken back. kept: all of it that stands."""

    def __init__(self, stream: AsyncStream, shape: Shape, buffer_tokens: int, **options: Any) -> None:
        super().__init__(stream, shape, buffer_tokens, **options)
        self.kept: Kept = None
        self._num_before = stream.num_assistant_tokens
        self._num_shown = self._num_before  # assistant tokens, those before included
        self._chars_before = stream.accepted_chars

    def add(self, deltas: Iterable[Any]) -> str | list[int]:
        delta = super().add(deltas)
        if isinstance(delta, str):
            self.kept = (self.kept if isinstance(self.kept, str) else "") + delta
        else:
            self.kept = [*(self.kept or ()), *delta]
        return delta

    async def roll_back(self) -> None:
        """Drop what is not cleared, from the stream and from what is kept."""
        # A policy that holds back may count fewer tokens as cleared after it was rolled back; what was shown stays.
        cleared = max(self.stream.verdict.cleared, self._num_shown)
        if isinstance(self.kept, str):
            cleared, num_chars = self.stream.cut_before(cleared)
            num_chars = max(num_chars, self._chars_before)
            self.kept = self.kept[: num_chars - self._chars_before]
            self._held.cut(num_chars)
        elif self.kept is not None:
            self.kept = self.kept[: cleared - self._num_before]
            self._held.cut(cleared)
        await self.stream.rollback(max(self.stream.num_assistant_tokens - cleared, 0))

    def _end_of(self, num_tokens: int) -> int:
        """No more than what a reply that is rolled back there keeps, because what is shown must stay."""
        end = super()._end_of(num_tokens)
        if isinstance(self.kept, str):
            num_tokens, num_chars = self.stream.cut_before(num_tokens)
            end = min(end, num_chars)
        self._num_shown = max(self._num_shown, num_tokens)
        return end
