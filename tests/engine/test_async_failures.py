"""AsyncEngine when things go wrong: a step that hangs, a model that fails, clients that leave."""

from __future__ import annotations

import asyncio
import gc
import random

import pytest
from launching import (
    BLOCK_BYTES,
    POISON,
    Launches,
    failures,
    ids,
    is_poisoned,
    lenient,
    opened,
    same,
    settled,
    sync_engine,
    with_engine,
)

from guardengine import AsyncEngine, AsyncStream, GuardEngineError, Overloaded, StreamClosed

# -- no time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "rule"), [("closed", "timeout"), ("open", "timeout-open")])
def test_labels_that_come_too_late(tiny, option: str, rule: str) -> None:
    """In a step that hangs: what is under way, what is queued behind it, and what a stream was opened with."""

    async def use(engine: AsyncEngine, launches: Launches) -> None:
        policy = lenient(on_timeout=option)
        first, second = await opened(engine, 2, policy=policy)
        launches.hold()
        third = await engine.open(token_ids=[1], policy=policy, timeout_s=0.03)
        under_way = asyncio.create_task(first.append([3, 4], timeout_s=0.03))
        await launches.until_held()
        queued = asyncio.create_task(second.append([5], timeout_s=0.03))
        assert await asyncio.gather(under_way, queued, third.prompt()) == [[], [], None]
        for stream in (first, second, third):  # the thread still hangs, and the verdict says it already
            assert stream.verdict.rule == rule
        launches.may_run.set()
        await settled(engine)
        assert [label.position for label in first.labels] == [2, 3]
        assert [label.position for label in second.labels] == [2]
        assert await third.prompt() is not None
        assert [stream.verdict.rule for stream in (first, second, third)] == [rule] * 3
        assert (await failures(engine)) == {f"timeout-{option}": 3}
        assert [label.position for label in await first.append([6], timeout_s=20)] == [4]

    with_engine(tiny, use)


def test_a_hanging_step_is_seen(tiny) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        (stream,) = await opened(engine, 1)
        assert (await engine.health())["status"] == "ok"
        launches.hold()
        append = asyncio.create_task(stream.append([3]))
        await launches.until_held()
        two = await asyncio.gather(engine.health(timeout_s=0.02), engine.health(timeout_s=0.03))
        for health in two:
            assert health["status"] == "stalled"
            assert "in a step for" in health["note"]
        launches.may_run.set()
        assert len(await append) == 1
        assert (await engine.health())["status"] == "ok"

    with_engine(tiny, use)


def test_closing_does_not_wait_for_a_hanging_step(tiny) -> None:
    async def main() -> None:
        sync = sync_engine(tiny)
        launches = Launches(sync)
        engine = AsyncEngine(sync)
        (stream,) = await opened(engine, 1)
        launches.hold()
        append = asyncio.create_task(stream.append([3]))
        await launches.until_held()
        await engine.close(timeout_s=0.02)
        with pytest.raises(StreamClosed):
            await append
        with pytest.raises(StreamClosed):
            await stream.append([4])
        launches.may_run.set()
        await asyncio.wait_for(engine.calls.ended.wait(), 20)
        assert stream.is_closed
        assert sync.core.pool.num_free == sync.core.pool.num_blocks

    asyncio.run(main())


# -- clients that leave ------------------------------------------------------------------------------------


def test_cancelled_before_and_after_acceptance(tiny) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        first, second = await opened(engine, 2)
        launches.hold()
        accepted = asyncio.create_task(first.append([3, 4]))
        await launches.until_held()
        withdrawn = asyncio.create_task(first.append([5]))
        other = asyncio.create_task(second.append([6]))
        refused = asyncio.create_task(engine.open(token_ids=[1], stream_id="gone"))
        await asyncio.sleep(0)
        for task in (accepted, withdrawn, refused):
            task.cancel()
        launches.may_run.set()
        assert len(await other) == 1
        await settled(engine)
        assert first.token_ids == [1, 2, 3, 4]
        assert [label.position for label in first.labels] == [2, 3]
        assert (await engine.stats())["streams_open"] == 2
        for task in (accepted, withdrawn, refused):
            assert task.cancelled()

    with_engine(tiny, use)


def test_a_stream_that_nobody_holds_is_closed(tiny) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        streams = await opened(engine, 3)
        pending = asyncio.create_task(streams[0].append(ids(40)))
        await asyncio.sleep(0)
        pending.cancel()
        await asyncio.wait([pending])
        del streams[:2], pending
        gc.collect()
        assert (await engine.stats())["streams_open"] == 1
        assert len(await streams[0].append([3])) == 1

    with_engine(tiny, use)


def test_appends_of_a_closed_stream_end(tiny) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        (stream,) = await opened(engine, 1)
        launches.hold()
        under_way = asyncio.create_task(stream.append([3]))
        await launches.until_held()
        queued = [asyncio.create_task(stream.append(ids(9))) for _ in range(4)]  # two of them have no room
        closing = asyncio.create_task(stream.close())
        await asyncio.sleep(0)
        launches.may_run.set()
        await closing
        assert len(await under_way) == 1
        for result in await asyncio.gather(*queued, return_exceptions=True):
            assert isinstance(result, StreamClosed)

    with_engine(tiny, use, max_pending_tokens=20)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_cancellations(tiny, seed: int) -> None:
    """Whatever is cancelled: the ids of a stream are those of the calls that took effect, every one of them is
    labelled once, and a call that was not cancelled returns the labels of its own tokens."""

    async def use(engine: AsyncEngine, launches: Launches) -> None:
        rng = random.Random(seed)
        launches.fails = lambda batch: launches.num_computed % 17 == 0  # and succeeds the next time

        async def append(stream: AsyncStream, piece: list[int]) -> None:
            labels = await stream.append(piece, timeout_s=rng.choice([None, 30]))
            assert [label.token_id for label in labels] == piece
            done[stream].append([label.position for label in labels])

        async def talk() -> None:
            stream = await engine.open(token_ids=ids(rng.randint(1, 40), rng.randint(0, 9)))
            done[stream] = []
            for _ in range(6):
                tasks = [
                    asyncio.create_task(append(stream, ids(rng.randint(1, 20), rng.randint(0, 99))))
                    for _ in range(rng.randint(1, 3))
                ]
                for _ in range(rng.randint(0, 3)):
                    await asyncio.sleep(0)
                for task in tasks:
                    if rng.random() < 0.3:
                        task.cancel()
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    assert result is None or isinstance(result, asyncio.CancelledError), result
                if rng.random() < 0.2:
                    await stream.fork()  # and dropped
                if len(stream.token_ids) > 100:
                    break
            else:
                if rng.random() < 0.5:
                    await stream.close()

        done: dict[AsyncStream, list[list[int]]] = {}
        talks = [asyncio.create_task(talk()) for _ in range(24)]
        for _ in range(8):
            await asyncio.sleep(0.004)
            rng.choice(talks).cancel()
        for result in await asyncio.gather(*talks, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError | Overloaded), result
        await settled(engine)
        gc.collect()
        for stream, delivered in done.items():
            positions = [label.position for label in stream.labels]
            assert positions == sorted(set(positions))
            flat = sorted(position for some in delivered for position in some)
            assert set(flat) <= set(positions)
            assert len(flat) == len(set(flat))
            if not stream.is_closed:
                assert len(positions) == len(stream.token_ids) - stream.prompt_label.position - 1
        done.clear()

    with_engine(
        tiny,
        use,
        kv_cache_bytes=60 * BLOCK_BYTES,
        max_num_batched_tokens=64,
        max_pending_tokens=200,
        max_in_flight=1 + seed % 2,
    )


# -- a model that fails ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "rule", "max_in_flight"), [("closed", "error", 1), ("open", "error-open", 2)]
)
def test_one_poisoned_stream(tiny, option: str, rule: str, max_in_flight: int) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        policy = lenient(on_error=option)
        streams = await opened(engine, 33, policy=policy)
        twins = await opened(engine, 33, policy=policy)
        expected = await asyncio.gather(*(stream.append([5, 6]) for stream in twins))
        launches.fails = is_poisoned
        pieces = [[5, 6] if i not in (7, 20) else [5, POISON] for i in range(33)]
        results = await asyncio.gather(*(s.append(piece) for s, piece in zip(streams, pieces, strict=True)))
        for i, (stream, labels) in enumerate(zip(streams, results, strict=True)):
            if i in (7, 20):
                assert labels == []
                assert stream.verdict.rule == rule
                assert stream.num_pending_tokens == 2
            else:
                assert same(labels, expected[i])
                assert stream.verdict.rule == "none"
        assert (await failures(engine)) == {f"error-{option}": 2}
        assert launches.num_failed < 2 + 2 * 2 * 6
        await engine.check_integrity()
        health = await engine.health()
        assert (health["status"], health["last_error"]) == ("ok", None)
        num_failed = launches.num_failed
        assert len(await streams[0].append([7])) == 1  # nobody tries the parked tokens again
        assert launches.num_failed == num_failed
        launches.fails = lambda batch: False
        assert [label.position for label in await streams[7].append([8])] == [4]
        assert [label.position for label in streams[7].labels] == [2, 3, 4]
        assert streams[7].verdict.rule == rule
        launches.fails = is_poisoned
        await streams[20].rollback(1)  # the poison: what is left is computed
        await settled(engine)
        assert [label.position for label in streams[20].labels] == [2]

    with_engine(tiny, use, max_in_flight=max_in_flight)


def test_a_failure_that_passes_is_not_seen(tiny) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        streams = await opened(engine, 3)
        launches.fails = lambda batch: launches.num_failed < 1
        assert [len(x) for x in await asyncio.gather(*(s.append([3, 4]) for s in streams))] == [2, 2, 2]
        assert await failures(engine) == {}

    with_engine(tiny, use)


def test_a_broken_model_turns_health_red_until_it_works(tiny) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        streams = await opened(engine, 20)
        launches.fails = lambda batch: True
        prompt = await engine.open(token_ids=[9])
        assert await asyncio.gather(*(s.append([3, 4]) for s in streams)) == [[]] * 20
        assert await prompt.prompt() is None
        assert prompt.verdict.rule == "error"
        assert launches.num_failed <= 12  # no search for a culprit: the canary died as well
        health = await engine.health()
        assert health["status"] == "failing"
        assert "the model failed" in health["note"]
        assert "RuntimeError" in health["last_error"]
        assert (await failures(engine)) == {"error-closed": 21}
        launches.fails = lambda batch: False
        assert len(await streams[0].append([5])) == 1
        health = await engine.health()
        assert (health["status"], health["last_error"]) == ("ok", None)

    with_engine(tiny, use)


def test_moderating_with_a_model_that_fails(checkpoints) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        launches.fails = lambda batch: True
        result = await engine.moderate([{"role": "user", "content": "hello"}])
        assert result.prompt is None
        assert (result.response.action, result.response.rule) == ("block", "error")

    with_engine(checkpoints(dtype="float32"), use)


def test_a_bug_in_the_engine_ends_it_and_nothing_hangs(tiny, monkeypatch) -> None:
    async def main() -> None:
        sync = sync_engine(tiny)
        engine = AsyncEngine(sync)
        streams = await opened(engine, 2)
        monkeypatch.setattr(sync.core, "_record", lambda finished: 1 / 0)
        results = await asyncio.gather(*(s.append([3]) for s in streams), return_exceptions=True)
        assert all(isinstance(result, StreamClosed) and "ZeroDivision" in str(result) for result in results)
        with pytest.raises(GuardEngineError, match="ZeroDivision"):
            await engine.open(token_ids=[1])
        assert (await engine.health())["status"] == "failing"
        await engine.close()

    asyncio.run(main())
