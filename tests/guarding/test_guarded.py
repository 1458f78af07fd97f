"""guarded(): what comes out is what was cleared, in the shape it came in; the source is always closed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
from guarding import BAD_USER, END, Source, bad_prompts, deltas, opened
from launching import Launches, settled, sync_engine, with_engine

from guardengine import AsyncEngine, AsyncStream, Policy, guarded, guarded_sync
from guardengine.errors import Blocked, ConfigError, InvalidText, InvalidTokens, StreamClosed
from guardengine.integrations import openai, vllm
from guardengine.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("bombs_are_unsafe")]

SAFE = "The capital is Paris (巴黎是法国的首都)，n'est-ce pas?\n\nprint('cafe\u0301') 👩‍👩‍👧 It's done."
BAD = SAFE[:30] + " bomb" + SAFE[30:]


async def collect(
    source: Any, stream: AsyncStream, out: list[Any] | None = None, **options: Any
) -> list[Any]:
    out = [] if out is None else out
    async for shown in guarded(source, stream, **options):
        out.append(shown)
    return out


def flat(lists: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


# -- what comes out ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_text_at_any_boundaries(folder, seed: int) -> None:
    """All of a safe reply, and of a bad one what is before the bad word, however it comes in pieces."""

    async def use(engine: AsyncEngine, _: Launches) -> None:
        rng = random.Random(seed)
        for text in (SAFE, BAD, "", "bomb", " bomb", "a bomb.", "one bomb", "two 💣 bom b"):
            stream = await opened(engine, hold_back=rng.randint(0, 4))
            source, out = Source(deltas(text, rng, rng.choice([1, 3, 9]))), ""
            async with aclosing(guarded(source, stream, max_ahead=rng.choice([1, 2, 16]))) as shown:
                async for part in shown:
                    out += part
                    is_whole = stream._state.turns[-1].is_closed and stream.verdict.action == "allow"  # type: ignore[index]
                    assert is_whole or len(out) <= stream.cleared_chars
            bad_at = text.find(" bomb")
            if bad_at < 0:
                assert out == text
                assert [label.token_id for label in stream.labels][-1] == END
            else:
                assert text[:bad_at].startswith(out)
                assert len(out) == bad_at or stream._state.policy.hold_back
                assert stream.verdict.action == "block"
            assert source.is_closed
            assert len(source.tasks) == 1 or not text
            await stream.close()

    with_engine(folder, use)


def test_ids_of_every_shape(folder, tokenizer: Tokenizer) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        ids, bad = tokenizer.encode_text(SAFE), tokenizer.encode_text(BAD)
        (bomb,) = tokenizer.encode_text(" bomb")
        num_safe = bad.index(bomb)
        assert await collect(Source([*ids, END]), await opened(engine)) == [*ids, END]
        assert await collect(Source(bad), await opened(engine), substitute=13) == [*bad[:num_safe], 13]
        lists = deltas(bad, random.Random(1), 4)
        found = await collect(Source([[], *lists]), await opened(engine, hold_back=1), substitute=[13, 14])
        assert found.pop() == [13, 14]
        assert flat(found) == bad[: num_safe - 1]
        objects = [{"ids": None}, *({"ids": part} for part in lists)]
        found = await collect(Source(objects), await opened(engine), ids=lambda item: item["ids"])
        assert flat(found) == bad[:num_safe]
        assert (await opened(engine, debounce=9)).verdict.cleared == 0
        found = await collect(iter([*bad, END]), await opened(engine, debounce=9))
        assert found == [*bad, END]

    with_engine(folder, use)


def test_ids_of_another_tokenizer(folder, tokenizer: Tokenizer) -> None:
    """Here one of bytes: a reply of many ids within characters."""
    letters = [bytes([byte]) for byte in range(256)]
    foreign = SimpleNamespace(
        decode=lambda ids: b"".join(letters[x] for x in ids if x < 256).decode(errors="replace")
    )

    async def use(engine: AsyncEngine, _: Launches) -> None:
        ids = [*SAFE.encode(), 256]
        assert await collect(Source(ids), await opened(engine), tokenizer=foreign) == ids
        lists = deltas(list(BAD.encode()), random.Random(2), 5)
        found = await collect(Source(lists), await opened(engine), tokenizer=foreign)
        assert bytes(flat(found)).decode() == BAD[:30]
        broken = [*b"ab \xe5\xb7"]  # ends within a character
        assert await collect(Source(broken), await opened(engine), tokenizer=foreign) == broken
        with pytest.raises(ConfigError, match="has no decode"):
            await collect(Source([1]), await opened(engine), tokenizer="gpt2")

    with_engine(folder, use)


def test_adapters(folder) -> None:
    def chunk(content: str | None, index: int = 0) -> Any:
        delta = SimpleNamespace(role="assistant", content=content, tool_calls=None)
        return SimpleNamespace(
            choices=[SimpleNamespace(index=index, delta=delta, finish_reason=None)], usage=None
        )

    def output(text: str, ids: list[int], num_outputs: int = 1) -> Any:
        return SimpleNamespace(
            outputs=[SimpleNamespace(index=0, text=text, token_ids=ids)] * num_outputs, finished=False
        )

    async def use(engine: AsyncEngine, _: Launches) -> None:
        parts = deltas(BAD, random.Random(3))
        chunks = [chunk(None), *map(chunk, parts), SimpleNamespace(choices=[], usage=SimpleNamespace())]
        found = await collect(Source(chunks), await opened(engine), text=openai.delta_text, substitute="…")
        assert "".join(found) == BAD[:30] + "…"
        dicts = [{"choices": [{"index": 0, "delta": {"content": part}}]} for part in parts]
        dicts = [{"choices": [{"delta": {"role": "assistant"}}]}, *dicts, {"choices": []}]
        assert "".join(await collect(dicts, await opened(engine), text=openai.delta_text)) == BAD[:30]
        with pytest.raises(ConfigError, match="choice 1"):
            await collect([chunk("a", index=1)], await opened(engine), text=openai.delta_text)
        outputs = [output(part, [5, 6]) for part in parts] + [output("", [])]
        assert "".join(await collect(Source(outputs), await opened(engine), text=vllm.delta_text)) == BAD[:30]
        assert flat(await collect(outputs, await opened(engine), ids=vllm.delta_ids)) == [5, 6] * len(parts)
        with pytest.raises(ConfigError, match="2 completions"):
            await collect([output("a", [5], 2)], await opened(engine), ids=vllm.delta_ids)

    with_engine(folder, use)


def test_a_second_reply(folder) -> None:
    """And one that had begun: text that others have fed does not come out."""

    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await opened(engine)
        await stream.append_text("Not our")
        assert (
            "".join(await collect(Source(["s, this", " one is"]), stream, end_turn=False)) == "s, this one is"
        )
        assert "".join(await collect(Source([" longer"]), stream)) == " longer"
        await stream.append([3838], role="user")
        assert "".join(await collect(Source(["Short", " it is"]), stream)) == "Short it is"
        raw = await engine.open(token_ids=[1, 2], role="assistant", policy=Policy.strict(debounce=1))
        assert await collect(Source([5, 6]), raw) == [5, 6]
        assert raw.token_ids == [1, 2, 5, 6]
        assert "".join(await collect(Source(["On ", "it goes"]), raw)) == "On it goes"

    with_engine(folder, use)


# -- blocks ------------------------------------------------------------------------------------------------


def test_a_blocked_prompt(folder) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        source = Source(deltas(SAFE, random.Random(0)))
        stream = await opened(engine, BAD_USER)
        assert await collect(source, stream, substitute="No.") == ["No."]
        assert source.num_pulled == 0
        launches.hold()
        source = Source(deltas(SAFE, random.Random(0)))
        stream = await opened(engine, BAD_USER)
        shown = asyncio.create_task(collect(source, stream, check_prompt="beside", max_ahead=3))
        while source.num_pulled < 3:
            await asyncio.sleep(0.001)
        launches.may_run.set()
        assert await shown == []
        assert (source.num_pulled, source.is_closed, stream.labels) == (3, True, [])

    with_engine(folder, use)


@pytest.mark.slow
def test_what_happens_on_a_block(folder) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        source = Source(["Take a bomb", " and", " more"], hangs=True)
        out = []
        async for part in guarded(source, await opened(engine), substitute="[removed]"):
            out.append(part)
            assert part != "[removed]" or source.is_closed  # the LLM is stopped first
        assert "".join(out) == "Take a[removed]"
        out = []
        with pytest.raises(Blocked, match=r"the reply is blocked: Unsafe, .*\(rule debounce\)") as caught:
            await collect(Source(["a bomb", " and"]), await opened(engine), out, on_block="raise")
        assert out == ["a"]
        assert caught.value.verdict.action == "block"
        with pytest.raises(Blocked, match="the prompt is blocked"):
            await collect(Source([]), await opened(engine, BAD_USER), on_block="raise")
        # Only the end shows that it was the word.
        assert "".join(await collect(Source(["a bo", "mb"]), await opened(engine))) == "a"

    with_engine(folder, use)


@pytest.mark.slow
@pytest.mark.parametrize(("option", "expected"), [("closed", "!"), ("open", "One two three")])
def test_labels_that_do_not_come(folder, option: str, expected: str) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        stream = await opened(engine, on_timeout=option)
        await stream.prompt()
        launches.hold()
        source = Source(["One two", " three"])
        assert "".join(await collect(source, stream, timeout_s=0.05, substitute="!")) == expected
        launches.may_run.set()
        await settled(engine)

    with_engine(folder, use)


# -- ends --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_source_that_fails(folder) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        out: list[str] = []
        source = Source(["One two", " three f"], error=OSError("the LLM is gone"))
        stream = await opened(engine)
        with pytest.raises(OSError, match="gone"):
            await collect(source, stream, out)
        assert "".join(out) == "One two three"
        assert stream.held_text == " f"

        async def fails_at_once() -> AsyncIterator[str]:
            raise OSError("no LLM")
            yield ""

        with pytest.raises(OSError, match="no LLM"):
            await collect(fails_at_once(), stream)

        class Cancelled:
            def __aiter__(self) -> Any:
                return self

            async def __anext__(self) -> str:
                raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):  # no reply that ends well
            await collect(Cancelled(), stream)

    with_engine(folder, use)


def test_a_consumer_that_leaves(folder) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        source = Source(["One two", " three"], hangs=True)
        stream = await opened(engine)
        async with aclosing(guarded(source, stream)) as shown:
            async for _part in shown:
                break
        assert source.is_closed
        assert not stream.is_closed
        source = Source(["x "], hangs=True)
        task = asyncio.create_task(collect(source, await opened(engine)))
        while not source.num_pulled:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert source.is_closed
        source = Source(["x y z"])
        stream = await opened(engine)
        shown = guarded(source, stream)
        await stream.close()
        with pytest.raises(StreamClosed):
            await anext(shown)

    with_engine(folder, use)


@pytest.mark.slow
def test_synchronous_sources_do_not_hold_up_the_loop(folder) -> None:
    closed = []

    def slow() -> Iterator[str]:
        try:
            for part in ("One two", " bomb", " four", " five"):
                time.sleep(0.02)
                yield part
            time.sleep(0.3)
            yield " six"
        finally:
            closed.append(True)

    async def use(engine: AsyncEngine, _: Launches) -> None:
        async def tick() -> None:
            nonlocal num_ticks
            while True:
                await asyncio.sleep(0.001)
                num_ticks += 1

        num_ticks = 0
        ticking = asyncio.create_task(tick())
        assert "".join(await collect(slow(), await opened(engine))) == "One two"
        ticking.cancel()
        assert closed == [True]
        assert num_ticks > 10

    with_engine(folder, use)


@pytest.mark.slow
def test_misuse(folder) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await opened(engine)

        async def chunks() -> AsyncIterator[str]:
            yield ""

        async def create() -> Any:
            return chunks()

        coroutine = create()
        for call in (
            lambda: guarded(chunks(), "stream"),
            lambda: guarded(5, stream),
            lambda: guarded(coroutine, stream),
            lambda: guarded(chunks(), stream, on_block="Sorry"),
            lambda: guarded(chunks(), stream, on_block="raise", substitute="Sorry"),
            lambda: guarded(chunks(), stream, check_prompt="never"),
            lambda: guarded(chunks(), stream, max_ahead=0),
            lambda: guarded(chunks(), stream, text=str, ids=list),
            lambda: guarded(chunks(), stream, text="content"),
            lambda: guarded(chunks(), stream, text=str, tokenizer=stream),
            lambda: guarded_sync([], stream, engine),
        ):
            with pytest.raises(ConfigError):
                call()
        await coroutine
        for error, items, options in (
            (InvalidTokens, [{"text": "a"}], {}),
            (InvalidTokens, [b"a"], {}),
            (InvalidTokens, [[True, "a"]], {}),
            (InvalidTokens, ["a"], {"ids": lambda item: item}),
            (InvalidText, ["a", 5], {}),
            (InvalidText, [5], {"text": lambda item: item}),
            (InvalidTokens, [10**9], {}),
        ):
            source = Source(items)
            with pytest.raises(error):
                await collect(source, await opened(engine), **options)
            assert source.is_closed

    with_engine(folder, use)


# -- without asyncio ---------------------------------------------------------------------------------------


def test_guarded_sync(folder, tokenizer: Tokenizer) -> None:
    with sync_engine(folder) as engine:

        def opened(content: str = "Where?", **policy: Any) -> Any:
            policy = Policy.strict(**{"debounce": 1, **policy})
            return engine.open(messages=[{"role": "user", "content": content}], policy=policy)

        closed = []

        def source(items: list[Any]) -> Iterator[Any]:
            try:
                yield from items
            finally:
                closed.append(True)

        parts = deltas(BAD, random.Random(4))
        assert "".join(guarded_sync(deltas(SAFE, random.Random(4)), opened(hold_back=3), engine)) == SAFE
        assert "".join(guarded_sync(source(parts), opened(), engine, substitute="!")) == BAD[:30] + "!"
        ids = tokenizer.encode_text(SAFE)
        assert list(guarded_sync(ids, opened(), engine)) == ids
        shown = guarded_sync(source(parts), opened(), engine)
        next(shown)
        shown.close()
        assert closed == [True, True]
        stream = opened()
        bad_prompts.add(len(stream.token_ids) - 1)
        with pytest.raises(Blocked):
            list(guarded_sync(source(parts), stream, engine, on_block="raise"))
        assert closed == [True, True]  # it was never begun
        with pytest.raises(ConfigError):
            guarded_sync(parts, "stream", engine)  # type: ignore[arg-type]
