"""intervene(): what came out is never taken back, what is kept was cleared, and the stream is a fresh one of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest
from guarding import BAD_USER, END, Source, deltas, opened
from launching import Launches, same, settled, with_engine

from guardengine import AsyncEngine, Policy, Verdict, intervene
from guardengine.errors import Blocked, ConfigError
from guardengine.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("bombs_are_unsafe")

WORDS = [
    " Paris",
    " 巴黎",
    " cafe\u0301",
    " 👩‍👩‍👧",
    ",",
    "\n",
    " e\u0301\u0323\u0301",
    " 𝔘𝔘",
    " fold",
    " x1",
]


async def check_as_fresh(engine: AsyncEngine, stream: Any) -> None:
    """What is computed on a stream that was rolled back is what a new one of its tokens would have."""
    await settled(engine)
    await engine.check_integrity()
    fresh = await engine.open(messages=[{"role": "user", "content": "Where?"}], cache_salt="of its own")
    start = len(fresh.token_ids)
    assert stream.token_ids[:start] == fresh.token_ids
    (first, *_) = [label.position for label in stream.labels] or [0]
    reply = stream.token_ids[first:] if stream.labels else []
    if reply:
        labels = await fresh.append(reply)
        assert fresh.token_ids == stream.token_ids
        assert same(labels, stream.labels)
    await fresh.close()


@pytest.mark.slow
# The later ones roll back within a character, and behind what a policy that holds back had cleared before.
@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5, 6, 8, 24, 30])
@pytest.mark.parametrize("kind", ["text", "ids"])
def test_any_reply(folder, tokenizer: Tokenizer, kind: str, seed: int) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        rng = random.Random(seed)

        async def moderate(buffer_tokens: int) -> None:
            stream = await opened(engine, hold_back=rng.choice([0, 0, 2]), debounce=rng.choice([1, 1, 2]))
            calls: list[Any] = []
            out: Any = "" if kind == "text" else []
            sources: list[Source] = []

            def generate(kept: Any, guidance: Any) -> Source:
                assert len(sources) == len(calls)
                assert guidance == (f"hint {len(calls)}" if calls else None)
                assert kept == (calls[-1] if calls else None)
                words = rng.choices(WORDS, k=rng.randint(0, 30))
                for _ in range(rng.choice([0, 1, 1, 1])):
                    words.insert(rng.randint(0, len(words)), " bomb bomb")
                text = "".join(words)
                pieces = deltas(text if kind == "text" else tokenizer.encode_text(text), rng, 6)
                sources.append(Source(pieces))
                return sources[-1]

            async def callback(verdict: Verdict, kept: Any) -> str:
                assert verdict.action == "block"
                assert stream.verdict.action == "allow"  # it was rolled back
                assert kept[: len(out)] == out
                calls.append(kept)
                await check_as_fresh(engine, stream)
                if kind == "ids":
                    assert [label.token_id for label in stream.labels] == kept
                assert stream.verdict.cleared <= len(stream.labels)
                return f"hint {len(calls)}"

            max_ahead = rng.choice([1, 4, 16])
            async for part in intervene(
                generate, stream, callback=callback, buffer_tokens=buffer_tokens, max_ahead=max_ahead
            ):
                out += part
                if not stream._state.turns[-1].is_closed and kind == "ids":  # type: ignore[index]
                    assert len(out) <= max(stream.verdict.cleared - buffer_tokens, 0)
                assert "bomb" not in out if kind == "text" else tokenizer.encode_text(" bomb")[0] not in out
            assert len(calls) <= 5
            assert all(source.is_closed or not source.num_pulled for source in sources)
            if stream.verdict.action == "allow":
                reply = [label.token_id for label in stream.labels]
                assert reply.pop() == END
                if kind == "ids":
                    assert reply == out
                else:
                    assert stream.span(stream.labels[-1]).end_char == len(out)  # type: ignore[union-attr]
                await check_as_fresh(engine, stream)
            else:
                assert len(calls) == 5
            await stream.close()

        for buffer_tokens in (0, 1, 3, 40):
            await moderate(buffer_tokens)

    with_engine(folder, use, max_model_len=1024)


def test_the_reader_lags_behind(folder) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await opened(engine)
        shown = intervene(
            lambda kept, hint: Source([[5]] * 9, hangs=True),
            stream,
            callback=print,
            buffer_tokens=6,
            max_ahead=1,
        )
        found = [await anext(shown) for _ in range(3)]
        assert found == [[5]] * 3
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(shown), 0.1)

    with_engine(folder, use)


def test_it_gives_up(folder) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        kept: list[Any] = []

        def generate(_: Any, hint: Any) -> Iterator[str]:
            yield from (" a", " b", " bomb", " c")

        def callback(verdict: Verdict, so_far: Any) -> None:
            kept.append(so_far)

        async def collect(stream: Any, **options: Any) -> list[str]:
            return [x async for x in intervene(generate, stream, callback=callback, **options)]

        stream = await opened(engine)
        assert (
            "".join(await collect(stream, max_retries=3, buffer_tokens=3, substitute="No."))
            == " a b a b aNo."
        )
        assert kept == [" a b", " a b a b", " a b a b a b"]
        assert stream.verdict.action == "block"
        with pytest.raises(Blocked) as caught:
            await collect(await opened(engine), max_retries=0, on_block="raise")
        assert caught.value.verdict.action == "block"
        kept.clear()
        assert await collect(await opened(engine, BAD_USER), substitute="No.") == ["No."]
        assert kept == []  # nothing to roll back

    with_engine(folder, use)


def test_failures_are_not_the_replys(folder) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        stream = await opened(engine)
        await stream.prompt()
        launches.fails = lambda batch: True
        calls: list[Any] = []
        shown = intervene(lambda *_: Source(["a b c"]), stream, callback=lambda *x: calls.append(x))
        assert [x async for x in shown] == []
        assert stream.verdict.rule == "error"
        assert calls == []
        launches.fails = lambda batch: False

    with_engine(folder, use)


def test_a_reply_that_had_begun(folder) -> None:
    """What is not ours is neither shown nor rolled back."""

    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await opened(engine, hold_back=4)
        await stream.append_text("Not ours ")
        before = stream.token_ids
        replies = iter([[" bomb"], [" one", " two"]])
        found = []

        async with aclosing(
            intervene(lambda *_: Source(next(replies)), stream, callback=lambda v, kept: found.append(kept))
        ) as shown:
            assert "".join([x async for x in shown]) == " one two"
        assert found == [""]
        assert stream.token_ids[: len(before)] == before

    with_engine(folder, use)


def test_misuse(folder) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await opened(engine)
        for options in (
            {"stream": "stream"},
            {"generate": []},
            {"callback": None},
            {"buffer_tokens": -1},
            {"max_retries": 1.5},
            {"max_ahead": 0},
            {"on_block": "Sorry"},
            {"text": str, "ids": list},
        ):
            with pytest.raises(ConfigError):
                intervene(**{"generate": Source, "stream": stream, "callback": print, **options})
        assert Policy().debounce == 2

    with_engine(folder, use)
