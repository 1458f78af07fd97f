"""guarded(): an LLM's stream of text or ids, of which only what the policy has cleared comes out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Sequence
from typing import Any, Literal

from guardengine.engine.async_stream import AsyncStream
from guardengine.engine.engine import Engine
from guardengine.engine.stream import Stream
from guardengine.errors import Blocked, ConfigError
from guardengine.guarding.deltas import Extractor, Reply, Shape
from guardengine.guarding.pull_ahead import MAX_AHEAD, PullAhead
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

    source: an async iterator, or a synchronous one (which is pulled in a thread). Its items are str, or Qwen3 ids
    as int or list[int]; anything else with `text` or `ids`, a function that takes a str or a list of ids, or None,
    from an item (guardengine.integrations has some). With `tokenizer`, the LLM's, ids are of another vocabulary and
    are fed as the text that they decode to. Text comes out as str, ids as int if they came as int, else as list[int].

    The prompt is judged first. check_prompt "first": nothing is pulled from the source before that, and nothing at all
    when the prompt is blocked. "beside": pulling begins at once, showing does not.

    The source is pulled in a task of its own, at most `max_ahead` items before they are fed; all that have come are fed
    together. It is closed (aclose or close) at the end, on a block, on an error, and when the consumer stops early;
    close this generator (contextlib.aclosing) where you break out of a loop over it and want that at once.

    At the end the reply is finished (`finish_text`; without `end_turn` it stays open), and what is left comes out,
    unless that is blocked. On a block what was cleared before comes out, then `substitute` as it is given, if any; with
    on_block="raise", Blocked is raised instead. An error of the source is raised after what was cleared by then; the
    reply is not finished then.

    timeout_s: as in `AsyncStream.append`, for each. Tokens that went unjudged block or pass by the stream's policy.
    Nobody else may append to the stream meanwhile. Raises what `append` and `append_text` raise, InvalidText or
    InvalidTokens for items of another type, and ConfigError at once.
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
    if isinstance(max_ahead, bool) or not isinstance(max_ahead, int) or max_ahead < 1:
        raise ConfigError(f"max_ahead={max_ahead!r}: a whole number from 1 is needed")
    ahead = PullAhead(source, max_ahead)
    is_beside = check_prompt == "beside"
    return _guarded(ahead, stream, shape, on_block, substitute, timeout_s, end_turn, is_beside)


async def _guarded(
    ahead: PullAhead,
    stream: AsyncStream,
    shape: Shape,
    on_block: OnBlock,
    substitute: Any,
    timeout_s: float | None,
    end_turn: bool,
    is_beside: bool,
) -> AsyncGenerator[Any, None]:
    try:
        if is_beside:
            ahead.start()
        await stream.prompt()
        if not is_blocked(stream):
            ahead.start()
            reply = Reply(stream, shape)
            while deltas := await ahead.take():
                await append_delta(stream, reply.add(deltas), timeout_s)
                has_blocked = is_blocked(stream)
                for shown in reply.take():
                    yield shown
                if has_blocked:
                    break
            else:
                await append_delta(stream, reply.finish(), timeout_s)
                await finish_reply(stream, end_turn, timeout_s)
                has_blocked = is_blocked(stream)
                for shown in reply.take() if has_blocked else reply.rest():
                    yield shown
            if not has_blocked:
                return
        await ahead.close()  # the LLM need not wait until somebody has read the substitute
        for shown in instead(stream.verdict, on_block, substitute):
            yield shown
    finally:
        await ahead.close()


async def append_delta(stream: AsyncStream, delta: str | list[int], timeout_s: float | None) -> None:
    """Append text or ids, if there are any."""
    if isinstance(delta, str) and delta:
        await stream.append_text(delta, timeout_s=timeout_s)
    elif not isinstance(delta, str) and delta:
        await stream.append(delta, timeout_s=timeout_s)


async def finish_reply(stream: AsyncStream, end_turn: bool, timeout_s: float | None) -> None:
    """Feed what is held back, and the reply's <|im_end|> where there is one to feed."""
    if end_turn and can_end_turn(stream):
        await stream.finish_text(timeout_s=timeout_s)
    elif stream.held_text:
        await stream.finish_text(end_turn=False, timeout_s=timeout_s)


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

    The engine's other streams advance too; their labels are in their `labels`. Raises as `guarded`, Overloaded where
    there is no room, and what `Engine.run` raises.
    """
    shape = Shape(text, ids, tokenizer)
    shape.check()
    check_on_block(on_block, substitute)
    if not isinstance(stream, Stream):
        raise ConfigError(
            f"stream is {type(stream).__name__}, not an Engine's Stream; use guarded with others"
        )
    return _guarded_sync(source, stream, engine, shape, on_block, substitute, end_turn)


def _guarded_sync(
    source: Iterable[Any],
    stream: Stream,
    engine: Engine,
    shape: Shape,
    on_block: OnBlock,
    substitute: Any,
    end_turn: bool,
) -> Generator[Any, None, None]:
    def append(delta: str | list[int]) -> None:
        if isinstance(delta, str):
            stream.append_text(delta)
        elif delta:
            stream.append(delta)
        engine.run()

    try:
        engine.run()
        has_blocked = is_blocked(stream)
        if not has_blocked:
            reply = Reply(stream, shape)
            for delta in source:
                append(reply.add([delta]))
                has_blocked = is_blocked(stream)
                yield from reply.take()
                if has_blocked:
                    break
            else:
                if tail := reply.finish():
                    append(tail)
                if end_turn and can_end_turn(stream):
                    stream.finish_text()
                elif stream.held_text:
                    stream.finish_text(end_turn=False)
                engine.run()
                has_blocked = is_blocked(stream)
                yield from reply.take() if has_blocked else reply.rest()
    finally:
        if callable(close := getattr(source, "close", None)):
            close()
    if has_blocked:
        yield from instead(stream.verdict, on_block, substitute)


def is_blocked(stream: AsyncStream | Stream) -> bool:
    """Whether the stream's policy blocks it by now."""
    return stream.verdict.action == "block"


def can_end_turn(stream: AsyncStream | Stream) -> bool:
    """Whether there is an <|im_end|> to feed: on a stream opened from messages, unless the LLM's ids had it."""
    turns = stream._state.turns
    return turns is not None and not (turns[-1].role == "assistant" and turns[-1].is_closed)


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
