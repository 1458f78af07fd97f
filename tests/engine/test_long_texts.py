"""Long texts through AsyncEngine: measured beside the engine's thread, while other streams go on, in their turn."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from launching import Launches, failures, lenient, same, settled, sync_engine, with_engine

from guardengine import AsyncEngine
from guardengine.core.text_feeding import LONG_CHARS
from guardengine.errors import ConfigError, InvalidText, StreamClosed, StreamTooLong
from guardengine.text.retokenizer import Retokenizer
from guardengine.text.spans import HeldText
from guardengine.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

USER = {"role": "user", "content": "Where?"}
# So few tokens that it fits into a stream of 512.
FITS = (" " * 127 + "\n") * (LONG_CHARS // 128 + 1)
TOO_LONG = " word" * LONG_CHARS


@pytest.fixture
def encoder(monkeypatch) -> Iterator[Encoder]:
    encoder = Encoder(monkeypatch)
    yield encoder
    encoder.may_go.set()


class Encoder:
    """Watches where long texts are encoded, and may hold them up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[str] = []
        self.may_go = threading.Event()
        self.may_go.set()
        self.num_fed: list[
            int
        ] = []  # characters, each time that the engine's thread makes ids of a reply's text
        feed = Retokenizer.feed

        def fed(retokenizer: Retokenizer, held: HeldText, delta: str | bytes, **options: Any) -> Any:
            self.num_fed.append(len(delta))
            return feed(retokenizer, held, delta, **options)

        monkeypatch.setattr(Retokenizer, "feed", fed)
        for name in ("encode_text", "encode_with_ends"):
            monkeypatch.setattr(Tokenizer, name, self._watch(getattr(Tokenizer, name)))

    def _watch(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        def watched(tokenizer: Tokenizer, text: str, **options: Any) -> Any:
            if len(text) > LONG_CHARS:
                self.threads.append(threading.current_thread().name)
                assert self.may_go.wait(20)
            return encode(tokenizer, text, **options)

        return watched

    async def until_held(self, count: int = 1) -> None:
        while len(self.threads) < count:
            await asyncio.sleep(0.001)


async def opened(engine: AsyncEngine, **options: Any) -> Any:
    stream = await engine.open([USER], policy=lenient(), **options)
    await stream.prompt()
    return stream


def test_others_go_on_while_long_texts_are_measured(folder, encoder) -> None:
    """Streams of the same tenant too; and what follows a long text on its own stream waits its turn."""

    async def use(engine: AsyncEngine, _: Launches) -> None:
        slow, other = await opened(engine), await opened(engine)
        encoder.may_go.clear()
        opening = asyncio.create_task(engine.open([{"role": "user", "content": TOO_LONG}]))
        first = asyncio.create_task(slow.append_text(FITS))
        await encoder.until_held(2)
        branch = asyncio.create_task(slow.fork())
        second = asyncio.create_task(slow.append_text("Seine ", timeout_s=20))
        assert len(await other.append([5, 6])) == 2
        assert len(await other.append_text("One two three")) == 2
        assert await other.append_text(" four", timeout_s=20)
        assert (await engine.stats())["lag_s"] > 0
        assert not any(task.done() for task in (opening, first, branch, second))
        assert slow.labels == []
        encoder.may_go.set()
        with pytest.raises(StreamTooLong, match="max_model_len"):
            await opening
        num_labels = len(await first)
        assert num_labels > 200
        # The fork is of the time between the two; the last white space was held back then.
        forked = await branch
        assert (await second)[0].position >= forked.num_tokens
        assert set(encoder.threads).isdisjoint({"guardengine"})

    with_engine(folder, use)


@pytest.mark.parametrize("encode", [str, str.encode])
def test_a_long_reply_is_what_engine_makes_of_it(folder, encoder, encode) -> None:
    text = FITS + "Seine, Tiber"
    messages = [USER, {"role": "assistant", "content": "x" + text}]
    with sync_engine(folder) as sync:
        stream, whole = sync.open([USER], policy=lenient()), sync.open(messages, policy=lenient())
        stream.append_text(encode(text), is_final=True)
        sync.run()
    encoder.threads.clear()

    async def use(engine: AsyncEngine, _: Launches) -> None:
        other = await opened(engine)
        assert same(await other.append_text(encode(text), is_final=True), stream.labels)
        assert other.token_ids == stream.token_ids
        assert len(encoder.threads) == 1
        other = await engine.open(messages, policy=lenient())
        await other.prompt()
        assert other.token_ids == whole.token_ids
        assert same(other.labels, whole.labels)

    with_engine(folder, use)


def test_what_cannot_fit_is_refused_and_the_stream_goes_on(folder, encoder) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await opened(engine)
        for text in (TOO_LONG, TOO_LONG.encode(), bytearray(TOO_LONG.encode())):
            results = await asyncio.gather(
                stream.append_text("One two "),
                stream.append_text(text),
                stream.append_text("three"),
                return_exceptions=True,
            )
            assert [type(each) for each in results] == [list, StreamTooLong, list]
        with pytest.raises(InvalidText, match="surrogate"):
            await stream.append_text(FITS + "\ud800")
        with pytest.raises(InvalidText, match="conversation"):
            await engine.open([{"role": "user", "content": FITS}, {"role": "system", "content": "x"}])
        with pytest.raises(ConfigError, match="either"):
            await engine.open([{"role": "user", "content": FITS}], token_ids=[1])
        await stream.finish_text()
        text = engine.engine.chat.tokenizer.decode(label.token_id for label in stream.labels[:-1])  # type: ignore[union-attr]
        assert text == "One two three" * 3
        assert max(encoder.num_fed) < LONG_CHARS + 100  # what cannot fit was not tokenized there
        assert set(encoder.threads).isdisjoint({"guardengine"})

    with_engine(folder, use)


@pytest.mark.parametrize("how", ["cancelled", "late", "closed"])
def test_calls_that_end_while_their_text_is_measured(folder, encoder, how) -> None:
    """Cancelled, it stays in the reply; late, it is fed all the same; of a stream that is closed it is nothing."""

    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await opened(engine)
        encoder.may_go.clear()
        append = asyncio.create_task(stream.append_text(FITS, timeout_s=0.05 if how == "late" else None))
        behind = asyncio.create_task(stream.append_text("Seine"))
        await encoder.until_held()
        if how == "cancelled":
            append.cancel()
            await asyncio.wait([append])
        elif how == "late":
            assert await append == []
            assert stream.verdict.rule == "timeout"
        else:
            await stream.close()
            async with asyncio.timeout(5):
                for task in (append, behind):
                    with pytest.raises(StreamClosed):
                        await task
        encoder.may_go.set()
        if how != "closed":
            await behind
            await stream.finish_text()
            await settled(engine)
            tokenizer = engine.engine.chat.tokenizer  # type: ignore[union-attr]
            assert tokenizer.decode(label.token_id for label in stream.labels[:-1]) == FITS + "Seine"
            assert (await failures(engine)).get("timeout-closed", 0) == (how == "late")
        assert set(encoder.threads).isdisjoint({"guardengine"})

    with_engine(folder, use)


def test_closing_drains_texts_that_are_being_measured(folder, encoder) -> None:
    async def main() -> None:
        async with AsyncEngine(sync_engine(folder)) as engine:
            stream = await opened(engine)
            encoder.may_go.clear()
            append = asyncio.create_task(stream.append_text(FITS, is_final=True))
            await encoder.until_held()
            closing = asyncio.create_task(engine.close())
            await asyncio.sleep(0.05)
            assert not closing.done()
            encoder.may_go.set()
            assert len(await append) > 200
            await closing

    asyncio.run(main())
