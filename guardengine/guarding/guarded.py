"""guarded(): an LLM's stream of text or ids, of which only what the policy has cleared comes out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Literal

from guardengine import checks
from guardengine.engine.async_stream import AsyncStream
from guardengine.engine.engine import Engine
from guardengine.engine.stream import Stream
from guardengine.errors import Blocked, ConfigError
from guardengine.guarding.deltas import Extractor, Shape
from guardengine.guarding.feeding import AsyncReply, SyncReply, is_blocked
from guardengine.guarding.pull_ahead import MAX_AHEAD, PullAhead
from guardengine.guarding.relay import relay, relay_sync
from guardengine.labels import Verdict

OnBlock = Literal["stop", "raise"]


def guarded(
    source: AsyncIterable[Any] | Iterable[Any],
    stream: AsyncStream,
    *,
    text: Extractor | None = None,
    ids: Extractor | None = None,
    tokenizer: Any = None,
    on_block: OnBlock = "stop",
    substitute: str | int | Sequence[int] | None = None,
    check_prompt: Literal["first", "beside"] = "first",
    max_ahead: int = MAX_AHEAD,
    timeout_s: float | None = None,
    end_turn: bool = True,
) -> AsyncGenerator[Any, None]:
    """Feed an LLM's deltas to a stream and yield what its policy has cleared of them, and nothing else.

        async for text in guarded(llm_deltas, stream):
            await send(text)

    The prompt is judged first; where it is blocked, nothing of the reply comes out. Then the source is pulled in a task
    of its own, and all deltas that have come are fed together. It is closed (aclose or close) at the end, on a block,
    on an error, and when the consumer stops early; close this generator (contextlib.aclosing) where you break out of a
    loop over it and want that at once.

    At the end the reply is finished (`finish_text`), and what is left comes out, unless that is blocked. On a block
    what was cleared before comes out, then `substitute`. An error of the source is raised after what was cleared by
    then; the reply is not finished then.

    Args:
        source: an async iterator, or a synchronous one, which is pulled in a thread. Its items are str, or Qwen3 ids as
            int or list[int]; anything else with `text` or `ids`.
        stream: nobody else may append to it meanwhile.
        text: takes a str, or None, from an item (guardengine.integrations has some).
        ids: takes a list of ids, or None, from an item.
        tokenizer: the LLM's, where ids are of another vocabulary than Qwen3's; they are fed as the text that they
            decode to.
        on_block: "stop" ends the reply on a block, "raise" raises Blocked.
        substitute: what comes out last on a block, as it is given.
        check_prompt: "first": nothing is pulled from the source before the prompt is judged, and nothing at all when it
            is blocked. "beside": pulling begins at once, showing does not.
        max_ahead: how many items are pulled before they are fed, at most; from 1.
        timeout_s: seconds, for each append, as in `AsyncStream.append`. Tokens that went unjudged block or pass by the
            stream's policy.
        end_turn: False leaves the reply open at its end.

    Returns:
        An async generator. Text comes out as str, ids as int if they came as int, else as list[int].

    Raises:
        ConfigError: at once, for options that contradict each other or are out of range.
        Blocked: the prompt or the reply is blocked, with on_block="raise".
        InvalidText, InvalidTokens: items are of another type, or are refused by `append_text` or `append`.
        StreamTooLong, Overloaded, StreamClosed: what `append` and `append_text` raise.
    """
    shape = Shape(text, ids, tokenizer)
    shape.check()
    check_on_block(on_block, substitute)
    if not isinstance(stream, AsyncStream):
        raise ConfigError(
            f"stream is {type(stream).__name__}, not an AsyncStream; use guarded_sync with an Engine's stream"
        )
    if check_prompt not in ("first", "beside"):
        raise ConfigError(f"check_prompt={check_prompt!r}: choose 'first' or 'beside'")
    checks.whole_number("max_ahead", max_ahead, 1)
    ahead = PullAhead(source, max_ahead)

    async def run() -> AsyncGenerator[Any, None]:
        try:
            if check_prompt == "beside":
                ahead.start()
            await stream.prompt()
            if not is_blocked(stream):
                reply = AsyncReply(stream, shape, end_turn=end_turn, timeout_s=timeout_s)
                async with aclosing(relay(ahead, reply)) as shown:
                    async for delta in shown:
                        yield delta
        finally:
            await ahead.close()
        if is_blocked(stream):
            for delta in instead(stream.verdict, on_block, substitute):
                yield delta

    return run()


def guarded_sync(
    source: Iterable[Any],
    stream: Stream,
    engine: Engine,
    *,
    text: Extractor | None = None,
    ids: Extractor | None = None,
    tokenizer: Any = None,
    on_block: OnBlock = "stop",
    substitute: str | int | Sequence[int] | None = None,
    end_turn: bool = True,
) -> Generator[Any, None, None]:
    """`guarded` without asyncio: feeds each item, runs the engine, and yields what is cleared.

    The engine's other streams advance too; their labels are in their `labels`.

    Args:
        source: an iterator; its items are as in `guarded`.
        stream: of `engine`. Nobody else may append to it meanwhile.
        engine: is run after every item, in this thread.
        text: takes a str, or None, from an item.
        ids: takes a list of ids, or None, from an item.
        tokenizer: the LLM's, where ids are of another vocabulary than Qwen3's.
        on_block: "stop" ends the reply on a block, "raise" raises Blocked.
        substitute: what comes out last on a block, as it is given.
        end_turn: False leaves the reply open at its end.

    Returns:
        A generator of deltas, as in `guarded`.

    Raises:
        Overloaded: there is no room.
        GuardEngineError: as `guarded`, and what `Engine.run` raises.
    """
    shape = Shape(text, ids, tokenizer)
    shape.check()
    check_on_block(on_block, substitute)
    if not isinstance(stream, Stream):
        raise ConfigError(
            f"stream is {type(stream).__name__}, not an Engine's Stream; use guarded with others"
        )

    def run() -> Generator[Any, None, None]:
        try:
            engine.run()
            if not is_blocked(stream):
                yield from relay_sync(source, SyncReply(stream, shape, engine.run, end_turn=end_turn))
        finally:
            if callable(close := getattr(source, "close", None)):
                close()
        if is_blocked(stream):
            yield from instead(stream.verdict, on_block, substitute)

    return run()


def instead(verdict: Verdict, on_block: OnBlock, substitute: Any) -> Sequence[Any]:
    """What comes in place of what is blocked. Raises Blocked where that was asked for."""
    if on_block == "raise":
        raise Blocked.by(verdict)
    return [] if substitute is None else [substitute]


def check_on_block(on_block: str, substitute: Any) -> None:
    """Raise ConfigError for what `instead` cannot do."""
    if on_block not in ("stop", "raise"):
        raise ConfigError(
            f"on_block={on_block!r:.80}: choose 'stop' or 'raise'; what to say instead is `substitute`"
        )
    if on_block == "raise" and substitute is not None:
        raise ConfigError("substitute was given, which on_block='raise' never shows; use one of them")
