"""AsyncEngine does what Engine does, for many tasks at once."""

from __future__ import annotations

import asyncio
import gc
import random
import threading

import pytest
from launching import BLOCK_BYTES, Launches, same, settled, sync_engine, with_engine

from guardengine import (
    AsyncEngine,
    AsyncStream,
    CheckpointError,
    ConfigError,
    Engine,
    InvalidTokens,
    Overloaded,
    Policy,
    StreamClosed,
    StreamTooLong,
    WrongLoop,
    WrongThread,
)

VOCAB = 512


def random_ids(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(400), k=length)


def pieces_of(seed: int, ids: list[int]) -> list[list[int]]:
    rng, pieces = random.Random(seed), []
    while ids:
        size = rng.randint(1, 5)
        pieces.append(ids[:size])
        ids = ids[size:]
    return pieces


def test_labels_are_those_of_engine_bit_for_bit(tiny) -> None:
    prompts = [random_ids(seed, 3 + seed % 20) for seed in range(40)]
    replies = [random_ids(1000 + seed, 1 + seed % 17) for seed in range(40)]
    with sync_engine(tiny) as engine:
        expected = []
        for prompt, reply in zip(prompts, replies, strict=True):
            with engine.open(token_ids=prompt) as stream:
                stream.append(reply)
                engine.run()
                expected.append((stream.prompt_label, stream.labels, stream.verdict))

    async def use(engine: AsyncEngine, _: Launches) -> None:
        async def talk(index: int) -> None:
            async with await engine.open(token_ids=prompts[index]) as stream:
                prompt = await stream.prompt()
                labels = []
                for piece in pieces_of(index, replies[index]):
                    found = await stream.append(piece)
                    assert [label.token_id for label in found] == piece
                    labels += found
                assert prompt is not None
                assert expected[index][0] is not None
                assert same([prompt, *labels], [expected[index][0], *expected[index][1]])
                assert stream.labels == labels
                assert stream.prompt_label is prompt
                assert stream.verdict == expected[index][2]

        await asyncio.gather(*(talk(index) for index in range(40)))

    with_engine(tiny, use)


@pytest.mark.slow
def test_two_thousand_streams(tiny) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        async def talk(index: int) -> None:
            async with await engine.open(token_ids=[index % 400, 3]) as stream:
                everyone.append(stream)
                first, second = await asyncio.gather(stream.append([5, 6]), stream.append([7]))
                assert [label.position for label in first + second] == [2, 3, 4]
                assert stream.labels == first + second
                assert await stream.prompt() is not None

        everyone: list[AsyncStream] = []
        before = (await engine.stats())["steps"]
        await asyncio.gather(*(talk(index) for index in range(2000)))
        assert len(everyone) == 2000
        assert (await engine.stats())["steps"] - before < 100

    with_engine(tiny, use, max_num_streams=2000, kv_cache_bytes=2100 * BLOCK_BYTES)


def test_appends_of_one_stream_are_served_in_order(tiny) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        async with await engine.open(token_ids=[1, 2]) as stream:
            results = await asyncio.gather(
                *(
                    stream.append([10 * i, 10 * i + 1], role="user" if i == 2 else "assistant")
                    for i in range(5)
                )
            )
            assert stream.token_ids == [1, 2, *(10 * i + j for i in range(5) for j in (0, 1))]
            positions = [[label.position for label in labels] for labels in results]
            assert positions == [[2, 3], [4, 5], [7], [8, 9], [10, 11]]
            assert results[2][0].role == "user"
            assert await stream.prompt() is results[2][0]

    with_engine(tiny, use)


def test_fork_and_rollback_follow_the_appends_before_them(tiny) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        async with await engine.open(token_ids=[1, 2]) as stream:
            await stream.prompt()
            launches.hold()
            first = asyncio.create_task(stream.append([3, 4, 5]))
            await launches.until_held()
            second = asyncio.create_task(stream.append([6, 7]))
            fork = asyncio.create_task(stream.fork("branch"))
            back = asyncio.create_task(stream.rollback(3))
            await asyncio.sleep(0)
            launches.may_run.set()
            await back
            branch = await fork
            assert [label.position for label in await first] == [2, 3, 4]  # they were there before
            assert [label.position for label in await second] == []
            assert stream.token_ids == [1, 2, 3, 4]
            assert branch.token_ids == [1, 2, 3, 4, 5, 6, 7]
            assert branch.stream_id == "branch"
            assert (await branch.prompt()).role == "user"
            await settled(engine)
            assert [label.position for label in branch.labels] == [2, 3, 4, 5, 6]
            assert same(branch.labels[:2], stream.labels)
            assert [label.position for label in await stream.append([9])] == [4]
            await branch.close()

    with_engine(tiny, use)


def test_a_fork_of_a_pending_turn_has_its_own(tiny) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await engine.open(token_ids=[1])
        labels, branch = await asyncio.gather(
            stream.append([2, 3], role="user"), stream.fork()
        )  # one message
        label = await branch.prompt()
        assert label.stream_id == branch.stream_id != labels[0].stream_id == stream.stream_id
        assert same([label], labels)

    with_engine(tiny, use)


@pytest.mark.slow
def test_whole_conversations(checkpoints) -> None:
    folder = checkpoints(dtype="float32")
    conversations = [
        [{"role": "user", "content": f"question {i}"}]
        + ([{"role": "assistant", "content": f"answer {i} " * (1 + i % 3)}] if i % 4 else [])
        for i in range(24)
    ]
    with sync_engine(folder) as engine:
        expected = engine.moderate_many(conversations)

    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await engine.open(messages=conversations[0])
        found, label = await asyncio.gather(engine.moderate_many(conversations), stream.prompt())
        for mine, other in zip(found, expected, strict=True):
            assert same([mine.prompt], [other.prompt])
            assert same(mine.labels, other.labels)
            assert mine.response == other.response
        assert same([label], [expected[0].prompt])
        one = await engine.moderate(conversations[1], Policy.loose())
        assert same(one.labels, expected[1].labels)
        with pytest.raises(InvalidTokens, match=r"conversations\[1\]"):
            await engine.moderate_many([conversations[0], [{"role": "nobody", "content": "x"}]])
        with pytest.raises(StreamTooLong):
            await engine.moderate([{"role": "user", "content": "word " * 400}])
        await stream.append([5])
        await stream.close()
        gc.collect()

    with_engine(folder, use, kv_cache_bytes=16 * BLOCK_BYTES, max_model_len=128)


def test_loading_is_awaited_and_its_errors_are_raised(tiny, tmp_path) -> None:
    async def main() -> None:
        engine = await AsyncEngine.from_pretrained(tiny, kv_cache_bytes=64 * BLOCK_BYTES, max_model_len=512)
        assert (await engine.stats())["streams_open"] == 0
        await engine.close()
        with pytest.raises(CheckpointError):
            async with AsyncEngine.from_pretrained(tmp_path / "nothing"):
                pass
        with pytest.raises(ConfigError, match="nonsense"):
            await AsyncEngine.from_pretrained(tiny, nonsense=1)
        broken = AsyncEngine.from_pretrained(tmp_path)
        for _ in range(2):
            with pytest.raises(CheckpointError):
                await broken.open(token_ids=[1])
        assert (await broken.health())["status"] == "failing"
        await broken.close()
        with pytest.raises(ConfigError, match="max_waiting=0"):
            AsyncEngine.from_pretrained(tiny, max_waiting=0)

    asyncio.run(main())


def test_the_engine_is_taken_over(tiny) -> None:
    engine = sync_engine(tiny)
    stream = engine.open(token_ids=[1])
    shared = AsyncEngine(engine)
    for call in (engine.step, engine.stats, stream.close, lambda: AsyncEngine(engine)):
        with pytest.raises(WrongThread):
            call()
    asyncio.run(shared.close())
    assert stream.is_closed
    assert len(stream.token_ids) == 1
    with pytest.raises(StreamClosed):
        asyncio.run(AsyncEngine(sync_engine_closed(tiny)).close())


def sync_engine_closed(folder) -> Engine:
    engine = sync_engine(folder)
    engine.close()
    return engine


def test_one_event_loop(tiny) -> None:
    engine = AsyncEngine(sync_engine(tiny))
    first = asyncio.new_event_loop()
    stream = first.run_until_complete(engine.open(token_ids=[1]))

    def elsewhere() -> None:
        for call in (
            lambda: engine.open(token_ids=[1]),
            lambda: stream.append([2]),
            stream.prompt,
            stream.fork,
            stream.close,
            engine.stats,
            engine.health,
            engine.close,
        ):
            with pytest.raises(WrongLoop, match="another one"):
                asyncio.run(call())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    elsewhere()
    assert [label.position for label in first.run_until_complete(stream.append([2]))] == [1]
    first.run_until_complete(engine.close())
    first.close()


def test_programming_errors_are_raised_and_change_nothing(tiny) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await engine.open(token_ids=[1, 2], stream_id="a")
        await stream.prompt()
        for error, call in (
            (InvalidTokens, lambda: stream.append([VOCAB])),
            (InvalidTokens, lambda: stream.append([])),
            (InvalidTokens, lambda: stream.rollback(3)),
            (ConfigError, lambda: stream.append([1], role="system")),
            (ConfigError, lambda: stream.append([1], timeout_s=0)),
            (ConfigError, lambda: stream.fork("a")),
            (StreamTooLong, lambda: stream.append([1] * 600)),
            (ConfigError, lambda: engine.open(token_ids=[1], stream_id="a")),
            (ConfigError, lambda: engine.open()),
            (ConfigError, lambda: engine.health(timeout_s=-1)),
        ):
            with pytest.raises(error):
                await call()
        assert stream.token_ids == [1, 2]
        assert stream.labels == []
        await stream.close()
        await stream.close()
        for call in (lambda: stream.append([1]), stream.fork, lambda: stream.rollback(0)):
            with pytest.raises(StreamClosed):
                await call()

    with_engine(tiny, use)


def test_open_is_refused_at_once(tiny) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        streams = [await engine.open(token_ids=[1]) for _ in range(2)]
        with pytest.raises(Overloaded, match="max_num_streams=2"):
            await engine.open(token_ids=[1])
        await streams.pop().close()
        await (await engine.open(token_ids=[1])).close()

    with_engine(tiny, use, max_num_streams=2)


@pytest.mark.parametrize("drain", [True, False])
def test_close_with_calls_waiting(tiny, drain: bool) -> None:
    async def main() -> None:
        sync = sync_engine(tiny)
        launches = Launches(sync)
        engine = AsyncEngine(sync)
        stream = await engine.open(token_ids=[1])
        await stream.prompt()
        launches.hold()
        under_way = asyncio.create_task(stream.append([2]))
        await launches.until_held()
        queued = asyncio.create_task(stream.append([3, 4]))
        await asyncio.sleep(0)
        closing = asyncio.create_task(engine.close(drain=drain))
        await asyncio.sleep(0.01)
        with pytest.raises(StreamClosed):
            await stream.append([9])
        with pytest.raises(StreamClosed):
            await engine.open(token_ids=[1])
        launches.may_run.set()
        await closing
        results = await asyncio.gather(under_way, queued, return_exceptions=True)
        if drain:
            assert [[label.token_id for label in labels] for labels in results] == [[2], [3, 4]]
            assert len(stream.labels) == 3
        else:
            assert [type(result) for result in results] == [StreamClosed, StreamClosed]
        assert stream.is_closed
        await stream.close()
        await engine.close()
        assert sync.core.pool.num_free == sync.core.pool.num_blocks
        for call in (
            engine.stats,
            engine.health,
            lambda: stream.append([1]),
            lambda: engine.open(token_ids=[1]),
        ):
            with pytest.raises(StreamClosed):
                await call()

    asyncio.run(main())


def test_an_engine_that_nobody_holds_is_closed(tiny) -> None:
    async def main() -> Engine:
        engine = AsyncEngine(sync := sync_engine(tiny))
        stream = await engine.open(token_ids=[1])
        await stream.append([2])
        ended = engine.calls.ended
        del stream, engine
        gc.collect()
        await asyncio.wait_for(ended.wait(), 20)
        return sync

    sync = asyncio.run(main())
    assert not sync.core.states


def test_idle_streams_are_closed_in_time(tiny) -> None:
    async def use(engine: AsyncEngine, _: Launches) -> None:
        stream = await engine.open(token_ids=[1])
        await stream.prompt()
        for _ in range(400):
            if stream.is_closed:
                break
            await asyncio.sleep(0.01)
        assert stream.is_closed
        assert (await engine.stats())["expired"] == 1
        with pytest.raises(StreamClosed, match="idle_ttl_s"):
            await stream.append([1])

    with_engine(tiny, use, idle_ttl_s=0.05)
