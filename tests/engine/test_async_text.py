"""Text through AsyncEngine: the sync engine's ids and labels, and none lost, whatever is cancelled or has no room."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import unicodedata
from itertools import pairwise
from typing import Any

import pytest
from launching import BLOCK_BYTES, Launches, failures, lenient, same, settled, sync_engine, with_engine

from guardengine import AsyncEngine, AsyncStream, Span
from guardengine.errors import (
    ConfigError,
    InvalidText,
    InvalidTokens,
    Overloaded,
    StreamClosed,
    StreamTooLong,
    WrongLoop,
)
from guardengine.text.spans import HeldText, TextState, TokenizedPiece
from guardengine.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

USER = {"role": "user", "content": "Where?"}
REPLY = "The capital is Paris (巴黎是法国的首都)，n'est-ce pas?\n\n```py\nprint('cafe\u0301')\n```\n👩‍👩‍👧 It's done."
END = 151645


def deltas(text: Any, seed: int = 0, longest: int = 7) -> list[Any]:
    rng, places = random.Random(seed), [0]
    while places[-1] < len(text):
        places.append(min(places[-1] + rng.randint(1, longest), len(text)))
    return [text[start:end] for start, end in pairwise(places)]


async def reply_of(stream: AsyncStream, tokenizer: Tokenizer) -> str:
    """All text of a finished reply, from its ids."""
    await settled(stream._owner)  # type: ignore[arg-type]
    ids = [label.token_id for label in stream.labels]
    assert ids.pop() == END
    return tokenizer.decode(ids)


async def opened(engine: AsyncEngine, **options: Any) -> AsyncStream:
    stream = await engine.open(messages=[USER], **options)
    await stream.prompt()
    return stream


# -- the sync engine's -------------------------------------------------------------------------------------


HISTORY = [USER, {"role": "assistant", "content": "Here."}]


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [{"role": "system", "content": "Be brief."}, *HISTORY, USER],
        [*HISTORY, USER, {"role": "assistant", "content": "Looking."}, {"role": "tool", "content": "Paris"}],
    ],
)
def test_a_reply_that_is_opened_empty(folder, messages) -> None:
    """Its header is fed with the prompt, and the rest is as without; the prompt's label does not wait for it."""

    async def use(engine: AsyncEngine, _: Launches) -> None:
        async with asyncio.timeout(20):
            plain = await engine.open(messages)
            await plain.prompt()
            ahead = await engine.open([*messages, {"role": "assistant", "content": ""}], cache_salt="another")
            label = await ahead.prompt()
            await settled(engine)
            template = engine.engine.chat.assistant_preamble()  # type: ignore[union-attr]
            assert ahead.token_ids == plain.token_ids + template
            assert label is not None
            assert (label.position, ahead.labels) == (plain.num_tokens - 1, [])
            for stream in (plain, ahead):
                for delta in deltas(REPLY):
                    await stream.append_text(delta)
                await stream.finish_text()
            assert ahead.token_ids == plain.token_ids
            assert same(ahead.labels, plain.labels)
            assert ahead.verdict == plain.verdict

    num_tokens = sync_engine(folder).chat.render(messages).prompt_end + 1  # type: ignore[union-attr]
    for budget in (num_tokens, num_tokens + 3, 2048):  # the header is cut off, cut in two, or not
        with_engine(folder, use, max_num_batched_tokens=budget)


@pytest.mark.parametrize("encode", [str, str.encode, lambda text: bytearray(text.encode())])
def test_labels_spans_and_cleared_text_are_those_of_engine(folder, encode) -> None:
    policy = lenient(hold_back=2)
    with sync_engine(folder) as sync, sync.open(messages=[USER], policy=policy) as stream:
        sync.run()
        expected, views = [], []
        for delta in deltas(encode(REPLY)):
            stream.append_text(delta)
            expected.append(sync.run())
            views.append((stream.cleared_chars, stream.held_text, [stream.span(x) for x in expected[-1]]))
        stream.finish_text()
        expected.append(sync.run())
        final = stream.cleared_chars, [stream.span(label) for label in stream.labels]

    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await opened(engine, policy=policy)
        for delta, labels, view in zip(deltas(encode(REPLY)), expected, views, strict=False):
            found = await stream.append_text(delta)
            assert same(found, labels)
            assert (stream.cleared_chars, stream.held_text, [stream.span(x) for x in found]) == view
        assert same(await stream.finish_text(), expected[-1])
        assert (stream.cleared_chars, [stream.span(label) for label in stream.labels]) == final
        # All at once: in order, each with the labels of its own tokens.
        stream = await opened(engine, policy=policy)
        calls = [stream.append_text(delta) for delta in deltas(encode(REPLY))]
        results = await asyncio.gather(*calls, stream.finish_text())
        assert [len(labels) for labels in results] == [len(labels) for labels in expected]
        assert same([x for labels in results for x in labels], [x for labels in expected for x in labels])

    with_engine(folder, use)


def test_held_text_waits_for_nothing(folder) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        stream = await opened(engine, policy=lenient())
        launches.fails = lambda batch: True
        assert await stream.append_text("One two") == []  # the model fails: " two" is held, "One" is parked
        assert stream.num_pending_tokens
        assert await stream.append_text("fold", timeout_s=5) == []
        assert stream.held_text == " twofold"
        launches.fails = lambda batch: False
        labels = await stream.append_text(" x")
        assert stream.labels[1:] == labels
        assert stream.held_text == " x"

    with_engine(folder, use)


def test_foreign_ids(folder, tokenizer: Tokenizer) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await opened(engine)
        text = "Paris, 巴黎 𝔘."
        for part in deltas(tokenizer.encode_text(text), longest=2):
            await stream.append_foreign_ids(part, tokenizer)
        await stream.finish_text()
        assert await reply_of(stream, tokenizer) == text
        for wrong in ("gpt2", None):
            with pytest.raises(ConfigError, match="has no decode"):
                await stream.append_foreign_ids([1], wrong)

    with_engine(folder, use)


def test_fork_and_rollback_with_held_text(folder, tokenizer: Tokenizer) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await opened(engine)
        branch, _ = await asyncio.gather(
            stream.fork(), stream.append_text("nobody waits")
        )  # forked before it
        assert branch.held_text == ""
        await stream.rollback(0)
        await stream.append_text("Hello wor")
        branch = await stream.fork()
        await asyncio.gather(
            stream.append_text("ld.", is_final=True), branch.append_text("ms eat", is_final=True)
        )
        # (" waits" was dropped by the rollback, the word before it was fed)
        assert await reply_of(stream, tokenizer) == "nobodyHello world."
        assert await reply_of(branch, tokenizer) == "nobodyHello worms eat"
        assert branch.span(branch.labels[-2]) == Span(17, 21, 17, 21)

    with_engine(folder, use)


# -- nothing is lost ---------------------------------------------------------------------------------------


def test_what_is_cancelled_stays_in_the_reply(folder, tokenizer: Tokenizer) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        stream = await opened(engine)
        launches.hold()
        first = asyncio.create_task(stream.append_text("Seine, Tiber "))
        await launches.until_held()
        tasks = [asyncio.create_task(stream.append_text(text)) for text in (" and Th", "ames", " f")]
        finish = asyncio.create_task(stream.finish_text())
        await asyncio.sleep(0)
        tasks[1].cancel()
        first.cancel()
        finish.cancel()
        launches.may_run.set()
        await asyncio.wait([first, finish, *tasks])
        assert (first.cancelled(), tasks[1].cancelled(), finish.cancelled()) == (True, True, True)
        assert not stream._state.turns[-1].is_closed  # type: ignore[index]
        await stream.append_text("low")
        assert len(await stream.finish_text()) == 2
        assert await reply_of(stream, tokenizer) == "Seine, Tiber  and Thames flow"

    with_engine(folder, use)


@pytest.mark.parametrize("seed", range(6))
def test_random_cancellations(folder, tokenizer: Tokenizer, seed: int) -> None:
    """Whatever is cancelled, has no room in time or fails: the reply's ids are those of all text, in order."""

    async def use(engine: AsyncEngine, launches: Launches) -> None:
        rng = random.Random(seed)
        launches.fails = lambda batch: launches.num_computed % 23 == 0
        words = [
            "Par",
            "is ",
            " and",
            " 巴黎",
            "\n",
            "e",
            "\u0301",
            " London.",
            "👩",
            "\u200d",
            " a b c d e f g h i",
        ]

        async def talk() -> None:
            stream, text = await engine.open(messages=[USER], policy=lenient()), ""
            for _ in range(6):
                tasks = []
                for _ in range(rng.randint(1, 4)):
                    text += (delta := "".join(rng.choices(words, k=rng.randint(1, 4))))
                    timeout_s = rng.choice([None, None, 0.003])
                    tasks.append(asyncio.create_task(stream.append_text(delta, timeout_s=timeout_s)))
                for _ in range(rng.randint(1, 4)):  # a call has begun before it is cancelled
                    await asyncio.sleep(0)
                for task in tasks:
                    if rng.random() < 0.4:
                        task.cancel()
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    assert isinstance(result, list | asyncio.CancelledError), result
                if rng.random() < 0.2:
                    await stream.fork()  # and dropped
            await stream.finish_text()
            assert await reply_of(stream, tokenizer) == unicodedata.normalize("NFC", text)
            assert stream.span(stream.labels[-1]).end_char == len(text)  # type: ignore[union-attr]
            await stream.close()

        for result in await asyncio.gather(*(talk() for _ in range(8)), return_exceptions=True):
            assert result is None or isinstance(result, Overloaded), result  # a fork without room

    with_engine(folder, use, max_pending_tokens=160, max_num_batched_tokens=32, max_in_flight=1 + seed % 2)


@pytest.mark.parametrize(("option", "action"), [("closed", "block"), ("open", "allow")])
def test_no_room_in_time(folder, tokenizer: Tokenizer, option: str, action: str) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        busy = await opened(engine, policy=lenient())
        full = await opened(engine, policy=lenient(on_overload=option))
        launches.fails = lambda batch: True
        assert await busy.append_text(" a" * 40) == []  # parked: its tokens stay pending
        assert await full.append_text("One two three" * 3 + " ", timeout_s=0.02) == []
        assert (full.verdict.action, full.cleared_chars) == (action, 0)
        assert await full.finish_text(timeout_s=0.02) == []
        await settled(engine)
        assert full.held_text == "One two three" * 3 + " "
        with pytest.raises(InvalidTokens, match="finish_text"):
            await full.append([5])
        launches.fails = lambda batch: False
        await busy.close()
        assert len(await full.append_text("four", is_final=True)) > 5
        assert await reply_of(full, tokenizer) == "One two three" * 3 + " four"
        assert (await failures(engine))[f"overload-{option}"] == 2

    with_engine(folder, use, max_pending_tokens=60)


# -- what may be shown -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "num_chars"), [("closed", 0), ("open", 7)])
def test_cleared_chars_count_failures_at_once(folder, option: str, num_chars: int) -> None:
    """While a step hangs, the engine's books say nothing of a deadline that was missed."""

    async def use(engine: AsyncEngine, launches: Launches) -> None:
        stream = await opened(engine, policy=lenient(on_timeout=option))
        launches.hold()
        append = asyncio.create_task(stream.append_text("One two three", timeout_s=0.05))
        await launches.until_held()
        assert await append == []
        assert stream.cleared_chars == num_chars
        launches.may_run.set()
        await settled(engine)
        assert stream.cleared_chars == 7  # the labels came, before the deadline was on record
        assert stream.verdict.action == ("block" if option == "closed" else "allow")

    with_engine(folder, use)


def test_cleared_chars_never_run_ahead(folder) -> None:
    """Read from another thread at every possible moment: only text whose tokens are labelled is cleared."""

    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await opened(engine, policy=lenient())
        stop, wrong = threading.Event(), []

        def watch() -> None:
            while not stop.is_set():
                num_chars, labels = stream.cleared_chars, stream.labels
                end = stream.span(labels[-1]).end_char if labels else 0  # type: ignore[union-attr]
                if num_chars > end:
                    wrong.append((num_chars, end))

        watcher = threading.Thread(target=watch)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        watcher.start()
        try:
            for i in range(60):
                await stream.append_text(f" word {i}")
        finally:
            stop.set()
            watcher.join()
            sys.setswitchinterval(interval)
        assert not wrong

    with_engine(folder, use, max_model_len=1024)


def test_books_can_be_read_while_they_are_written() -> None:
    """At every line of the writer: what was cleared before, or less; never what is written just now."""
    books, seen = TextState(), []
    books.extend(4, 0, TokenizedPiece([1, 2], [(0, 3, 0, 3), (3, 7, 3, 7)], HeldText(" x", b"", 7, 7), None))

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_name == "extend":
            seen.append([books.cleared_chars(4, cleared) for cleared in (1, 2)])
            assert books.span(6) in (None, Span(7, 9, 7, 9))
        return trace

    sys.settrace(trace)
    try:
        books.extend(6, 2, TokenizedPiece([3], [(7, 9, 7, 9)], HeldText("", b"", 9, 9), None))
    finally:
        sys.settrace(None)
    assert len(seen) > 4
    assert all(found == [3, 7] for found in seen)
    assert books.cleared_chars(4, 3) == 9


# -- refusals, snapshots -----------------------------------------------------------------------------------


def test_programming_errors_are_raised_and_change_nothing(folder) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await opened(engine)
        await stream.append_text("Hello wor")
        before = stream.token_ids, stream.held_text, stream.cleared_chars
        for error, call in (
            (InvalidText, lambda: stream.append_text("\ud83d")),
            (InvalidText, lambda: stream.append_text(None)),
            (StreamTooLong, lambda: stream.append_text("ab " * 2000)),
            (StreamTooLong, lambda: stream.append_text("a" * 10**6)),
            (ConfigError, lambda: stream.append_text(" a b", timeout_s=-1.0)),
            (InvalidTokens, lambda: stream.append([5])),
            (InvalidTokens, lambda: stream.append([5], role="user")),
            (InvalidText, stream.snapshot),
        ):
            with pytest.raises(error):
                await call()
            assert (stream.token_ids, stream.held_text, stream.cleared_chars) == before
        await stream.finish_text()
        with pytest.raises(InvalidTokens, match="turn has ended"):
            await stream.append_text("x")
        await stream.close()
        for call in (lambda: stream.append_text("x"), stream.finish_text, stream.snapshot):
            with pytest.raises(StreamClosed):
                await call()

        def elsewhere() -> None:
            for call in (
                lambda: stream.append_text("x"),
                stream.snapshot,
                lambda: engine.restore({}),
            ):
                with pytest.raises(WrongLoop):
                    asyncio.run(call())

        await asyncio.to_thread(elsewhere)

    with_engine(folder, use)


def test_without_a_tokenizer(tiny) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await engine.open(token_ids=[1, 2])
        with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
            await stream.append_text("x")

    with_engine(tiny, use)


def test_a_stream_goes_on_in_another_engine(folder) -> None:
    saved: list[str] = []

    async def first(engine: AsyncEngine, launches: Launches) -> None:
        stream = await opened(engine, policy=lenient())
        launches.fails = lambda batch: True
        append = stream.append_text("One two.", is_final=True)
        _, snapshot = await asyncio.gather(append, stream.snapshot())  # after the append was accepted
        saved.append(json.dumps(snapshot))

    async def second(engine: AsyncEngine, _: Launches) -> None:
        twin = await opened(engine, policy=lenient())
        expected = await twin.append_text("One two.", is_final=True)
        stream = await engine.restore(json.loads(saved[0]), "again")
        assert (await stream.prompt()).position == (await twin.prompt()).position
        label = (await stream.append([3838], role="user"))[0]
        assert label.stream_id == "again"
        assert same(stream.labels, expected)  # they were owed
        with pytest.raises(ConfigError, match="again"):
            await engine.restore(json.loads(saved[0]), "again")
        pending = await engine.restore(json.loads(saved[0]), "third")
        await pending.close()

    with_engine(folder, first)
    with_engine(folder, second, kv_cache_bytes=64 * BLOCK_BYTES)
