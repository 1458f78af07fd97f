"""Guard: a server or an engine in this process judge for hosts alike; only cleared text comes out of `show`."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from guarding import Source, bad_prompts, deltas, make_bombs_unsafe
from openai.types.chat import ChatCompletionChunk
from serving import Served, served

from guardengine import AsyncEngine, Policy
from guardengine.errors import Blocked, ConfigError, InvalidText, ServerError, StreamTooLong
from guardengine.guarding.held import HeldItems
from guardengine.integrations.guard import Guard
from guardengine.integrations.openai import chunk_text, message_text, split_chunk, text_messages

pytestmark = pytest.mark.servers

USER = {"role": "user", "content": "Where?"}
BAD_USER = {"role": "user", "content": "A bomb, a bomb"}
GOOD = "Sure, here is café 巴黎: take a pick and some patience."
BAD = "Sure, here is café 巴黎: take a bomb and some patience."
BEFORE = BAD[: BAD.index(" bomb")]
ONE = {"debounce": 1}


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Served]:
    with served(folder) as server:
        yield server


@pytest.fixture(params=["engine", pytest.param("url", marks=pytest.mark.servers)])
def run(request, folder, server, monkeypatch) -> Any:
    """run(use, **options): with a guard of either kind, on a policy whose only hits are bombs."""
    chat = server.engine.engine.chat
    make_bombs_unsafe(monkeypatch, chat.tokenizer)
    bad_prompts.add(chat.render([BAD_USER]).prompt_end)

    def run(use: Any, **options: Any) -> Any:
        async def main() -> Any:
            if request.param == "url":
                return await use(Guard(server.url, policy=ONE, **options))
            async with AsyncEngine.from_pretrained(folder, num_threads=1, kv_cache_bytes=2**25) as engine:
                found = await use(Guard(engine=engine, policy=ONE, **options))
                assert (await engine.stats())["streams_open"] == 0
                return found

        return asyncio.run(asyncio.wait_for(main(), 60))

    return run


def chunk(content: str | None = None, finish: str | None = None, **delta: Any) -> ChatCompletionChunk:
    choice = {"index": 0, "delta": {"content": content, **delta}, "finish_reason": finish}
    return ChatCompletionChunk(id="c", created=1, model="m", object="chat.completion.chunk", choices=[choice])


def chunks(text: str, seed: int = 0) -> list[ChatCompletionChunk]:
    usage = chunk(finish="stop").model_copy(update={"choices": []})
    pieces = deltas(text, random.Random(seed))
    return [chunk(role="assistant"), *map(chunk, pieces), chunk(finish="stop"), usage]


async def shown(guard: Guard, source: Any, messages: Any = (USER,), **options: Any) -> tuple[list[Any], Any]:
    """What comes out, and the error that it ends with."""
    found = []
    try:
        async for item in guard.show(source, messages, text=chunk_text, split=split_chunk, **options):
            found.append(item)
    except Blocked as error:
        return found, error
    return found, None


def text_of(items: list[Any]) -> str:
    return "".join(filter(None, map(chunk_text, items)))


def test_what_is_cleared_comes_out_as_it_was(run) -> None:
    given = chunks(GOOD)

    async def use(guard: Guard) -> Any:
        return await shown(guard, Source(list(given)))

    found, error = run(use)
    assert error is None
    assert text_of(found) == GOOD
    assert [each for each in found if not chunk_text(each)] == [given[0], *given[-2:]]  # and in their places
    assert found[0] == given[0]
    assert found[-2:] == given[-2:]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_block_cuts_at_what_is_cleared_and_closes_the_source(run, seed) -> None:
    source = Source(chunks(BAD, seed), hangs=True)

    async def use(guard: Guard) -> Any:
        return await shown(guard, source)

    found, error = run(use)
    assert text_of(found) == BEFORE
    assert not any(each.choices[0].finish_reason for each in found)
    assert error.verdict.action == "block"
    assert source.is_closed


@pytest.mark.slow
def test_big_chunks_are_cut_and_items_that_cannot_be_cut_wait(run) -> None:
    call = {"index": 0, "id": "x", "type": "function", "function": {"name": "f", "arguments": " bomb bomb"}}
    for items, before in (
        ([chunk(BAD)], BEFORE),
        ([chunk(GOOD), chunk(tool_calls=[call]), chunk(finish="tool_calls")], GOOD),
        ([chunk(reasoning_content="Well."), chunk(" So "), chunk(reasoning_content=BAD)], "Well. So "),
    ):

        async def use(guard: Guard, items: Any = items) -> Any:
            return await shown(guard, Source(items))

        found, error = run(use)
        assert error is not None
        assert before.startswith(text_of(found))
        assert not any(each.choices[0].delta.tool_calls for each in found)
        assert len(text_of(found)) >= len(before) - 4


def test_a_bad_prompt_starts_nothing(run) -> None:
    async def use(guard: Guard) -> None:
        source = Source(chunks(GOOD))
        found, error = await shown(guard, source, [BAD_USER])
        assert (found, error.verdict.rule, source.num_pulled) == ([], "prompt", 0)
        beside = Source(chunks(GOOD), hangs=True)
        found, error = await shown(guard, beside, [BAD_USER], check_prompt="beside")
        assert (found, error.verdict.rule, beside.is_closed) == ([], "prompt", True)

    run(use)


def test_a_reply_that_has_begun_is_judged_and_not_shown_again(run) -> None:
    async def use(guard: Guard) -> None:
        begun = [USER, {"role": "assistant", "content": "First: "}]
        found, error = await shown(guard, Source(chunks(GOOD)), begun)
        assert (text_of(found), error) == (GOOD, None)
        found, error = await shown(guard, Source([chunk(BAD)]), begun)
        assert text_of(found) == BEFORE
        assert error is not None
        found, error = await shown(
            guard, Source(chunks(GOOD)), [USER, {"role": "assistant", "content": "a bomb of "}]
        )
        assert (found, error.verdict.action) == ([], "block")

    run(use)


def test_whole_conversations(run) -> None:
    async def use(guard: Guard) -> None:
        assert (await guard.judge([USER])).action == "allow"
        assert (await guard.judge([BAD_USER])).rule == "prompt"
        assert (await guard.judge([USER], GOOD)).action == "allow"
        assert (await guard.judge([USER], BAD)).action == "block"
        assert (await guard.judge([USER, {"role": "assistant", "content": BAD}])).action == "block"
        with pytest.raises(StreamTooLong):
            await guard.judge([{"role": "user", "content": "a " * 9000}])
        with pytest.raises((InvalidText, ConfigError), match="role"):
            await guard.judge([{"role": "nobody", "content": "a"}])

    run(use)


def test_a_consumer_that_leaves_closes_the_source_and_the_stream(run) -> None:
    source = Source(chunks(GOOD), hangs=True)

    async def use(guard: Guard) -> None:
        items = guard.show(source, [USER], text=chunk_text, split=split_chunk)
        await anext(items)
        await items.aclose()

    run(use)
    assert source.is_closed


def test_an_error_of_the_source_comes_after_what_was_cleared(run) -> None:
    async def use(guard: Guard) -> None:
        found: list[Any] = []

        async def consume() -> None:
            source = Source(chunks(GOOD)[:9], error=RuntimeError("lost"))
            async for item in guard.show(source, [USER], text=chunk_text):
                found.append(item)

        with pytest.raises(RuntimeError, match="lost"):
            await consume()
        assert GOOD.startswith(text_of(found))

    run(use)


# -- a server that is not there ----------------------------------------------------------------------------

NOWHERE = {"url": "http://127.0.0.1:9", "reconnect_s": 0.05, "timeout_s": 2.0}


def test_without_a_server_nothing_comes_out() -> None:
    source = Source(chunks(GOOD))
    with pytest.raises(ServerError):
        asyncio.run(shown(Guard(**NOWHERE), source))
    assert source.num_pulled == 0


def test_or_everything_if_that_is_wanted_and_it_is_logged(caplog) -> None:
    guard = Guard(**NOWHERE, on_unreachable="open")
    with caplog.at_level(logging.CRITICAL):
        found, error = asyncio.run(shown(guard, Source(chunks(BAD))))
        assert (text_of(found), error) == (BAD, None)
        assert asyncio.run(guard.judge([USER], BAD)).rule == "unreachable-open"
    assert len(caplog.records) == 2
    assert "bomb" not in caplog.text


@pytest.mark.slow
@pytest.mark.servers
def test_a_server_that_dies_in_the_middle(folder, monkeypatch) -> None:
    async def items(stop: Any) -> AsyncIterator[Any]:
        for piece in deltas(GOOD, random.Random(1)):
            yield chunk(piece)
            if stop is not None and piece:
                await asyncio.to_thread(stop)
                stop = None

    for on_unreachable in ("closed", "open"):
        with served(folder) as server:
            make_bombs_unsafe(monkeypatch, server.engine.engine.chat.tokenizer)
            guard = Guard(
                server.url, policy=ONE, reconnect_s=0.05, timeout_s=5, on_unreachable=on_unreachable
            )

            def stop(server: Served = server) -> None:
                server.loop.call_soon_threadsafe(server.server.drain)
                server.loop.call_soon_threadsafe(server.server.drain)  # the second ends at once
                server._thread.join(20)

            if on_unreachable == "closed":
                with pytest.raises(ServerError):
                    asyncio.run(shown(guard, items(stop)))
            else:
                found, error = asyncio.run(shown(guard, items(stop)))
                assert (text_of(found), error) == (GOOD, None)
            server.stop = lambda: None  # type: ignore[method-assign]


# -- the parts ---------------------------------------------------------------------------------------------


def test_held_items_never_run_ahead_and_lose_nothing() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        texts = [GOOD[:i] if (i := rng.randint(0, 9)) > 2 else None for _ in range(12)]

        def split(text: str | None, num: int, rng: random.Random = rng) -> Any:
            return None if not text or rng.random() < 0.3 else (text[:num], text[num:])

        held, out, given, cleared = HeldItems(split), [], "", 0
        for text in texts:
            held.add(text, len(text or ""))
            given += text or ""
            cleared = rng.randint(cleared, len(given))
            out += held.take(cleared)
            assert len("".join(filter(None, out))) <= cleared
        out += held.rest()
        assert "".join(filter(None, out)) == given == "".join(filter(None, texts))
        assert out.count(None) == texts.count(None)
        assert held.take(10**9) == held.rest() == []


def test_requests_are_read_as_text() -> None:
    call = {"function": {"name": "search", "arguments": '{"q": "x"}'}}
    found = text_messages(
        [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
            {"role": "tool", "content": "found", "tool_call_id": "1"},
        ]
    )
    assert found == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": 'search{"q": "x"}'},
        {"role": "tool", "content": "found"},
    ]
    image = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]
    assert text_messages(image, skip_media=True) == [{"role": "user", "content": "a"}]
    with pytest.raises(InvalidText, match="image_url"):
        text_messages(image)
    with pytest.raises(InvalidText, match="is int"):
        text_messages([{"role": "user", "content": 5}])
    assert text_messages([{"role": "system", "content": "x"}]) == [{"role": "user", "content": "x"}]
    assert [m["role"] for m in text_messages([{"role": "assistant", "content": "x"}])] == [
        "user",
        "assistant",
    ]
    assert message_text({"content": "a", "tool_calls": [call]}) == 'asearch{"q": "x"}'


def test_options_are_checked(folder) -> None:
    for options, says in (
        ({}, "one of url"),
        ({"url": "http://x", "checkpoint": "y"}, "one of url"),
        ({"url": "nowhere"}, "url="),
        ({"engine": object()}, "not an AsyncEngine"),
        ({"url": "http://x", "on_unreachable": "maybe"}, "on_unreachable"),
        ({"url": "http://x", "policy": Policy.strict()}, "dict of its options"),
        ({"checkpoint": "x", "policy": {"preset": "lax"}}, "preset"),
        ({"checkpoint": "x", "policy": {"rude": 1}}, "unknown option"),
    ):
        with pytest.raises(ConfigError, match=says):
            Guard(**options)

    async def use() -> Any:
        guard = Guard(
            checkpoint=str(folder),
            engine_options={"num_threads": 1, "kv_cache_bytes": 2**25},
            policy={"preset": "loose"},
        )
        verdict = await guard.judge([USER])
        await guard.close()
        return verdict

    assert asyncio.run(use()).action in ("allow", "block")
