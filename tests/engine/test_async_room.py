"""AsyncEngine when there is no room: appends wait for it, in order, and until when."""

from __future__ import annotations

import asyncio

import pytest
from launching import (
    BLOCK,
    BLOCK_BYTES,
    POISON,
    Launches,
    failures,
    ids,
    is_poisoned,
    lenient,
    opened,
    settled,
    with_engine,
)

from guardengine import AsyncEngine, Overloaded


def test_appends_wait_for_room_in_order(tiny) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        streams = await opened(engine, 6)
        launches.hold()
        order: list[int] = []

        async def append(index: int) -> None:
            labels = await streams[index].append(ids(9))
            order.append(index)
            assert len(labels) == 9

        tasks = [asyncio.create_task(append(0))]
        await launches.until_held()
        tasks += [asyncio.create_task(append(index)) for index in range(1, 6)]
        await asyncio.sleep(0)
        launches.may_run.set()
        await asyncio.gather(*tasks)
        assert order == list(range(6))  # two at a time
        stats = await engine.stats()
        assert stats["failures"] == {}
        assert 1 <= stats["refused"] <= 4  # each that had to wait counts once

    with_engine(tiny, use, max_pending_tokens=20)


def test_appends_wait_for_kv_blocks(tiny) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        streams = await opened(engine, 8)
        labels = await asyncio.gather(*(stream.append(ids(4 * BLOCK, i)) for i, stream in enumerate(streams)))
        assert [len(found) for found in labels] == [4 * BLOCK] * 8
        assert (await engine.stats())["preemptions"] > 0
        for i, stream in enumerate(streams):
            assert stream.token_ids == [1, 2 + i, *ids(4 * BLOCK, i)]

    with_engine(tiny, use, kv_cache_bytes=11 * BLOCK_BYTES, prefix_caching=False)


@pytest.mark.parametrize(("option", "action"), [("closed", "block"), ("open", "allow")])
def test_no_room_in_time(tiny, option: str, action: str) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        policy = lenient(on_overload=option)
        busy, full = await opened(engine, 2, policy=policy)
        launches.fails = is_poisoned
        assert await busy.append([POISON] * 15) == []  # parked: its tokens stay pending
        assert await full.append(ids(9), timeout_s=0.02) == []
        assert full.token_ids == [1, 3]
        assert (full.verdict.action, full.verdict.rule) == (
            action,
            "overload" if option == "closed" else "overload-open",
        )
        assert (await failures(engine))[f"overload-{option}"] == 1
        with pytest.raises(Overloaded, match="wait for room"):
            await asyncio.gather(full.append(ids(9), timeout_s=0.05), engine.open(token_ids=[1]))
        await settled(engine)
        # Behind a large append that waits, a small one waits too; both go on when there is room.
        large, small = asyncio.create_task(full.append(ids(9))), asyncio.create_task(full.append([4]))
        await asyncio.sleep(0.01)
        assert not large.done()
        assert not small.done()
        await busy.close()
        assert len(await large) == 9
        assert len(await small) == 1
        assert full.verdict.rule.startswith("overload")

    with_engine(tiny, use, max_pending_tokens=20)


def test_other_tenants_are_not_held_up(tiny) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        (mine,) = await opened(engine, 1, tenant="mine")
        (other,) = await opened(engine, 1, tenant="other")
        launches.fails = is_poisoned
        await mine.append([POISON] * 15)
        waiting = asyncio.create_task(mine.append(ids(9)))
        assert len(await other.append(ids(9))) == 9
        await (await engine.open(token_ids=[1], tenant="other")).close()
        assert not waiting.done()
        back = asyncio.create_task(mine.rollback(3))  # after the append before it
        refused = (await engine.stats())["refused"]
        for _ in range(5):  # the thread comes round, and tries again
            assert (await engine.stats())["appends_waiting"] == 1
        assert (await engine.stats())["refused"] == refused == 1
        assert not back.done()
        waiting.cancel()
        await back
        assert mine.token_ids == [1, 2, *[POISON] * 12]

    with_engine(tiny, use, max_pending_tokens_per_tenant=20)


def test_no_room_when_its_turn_comes_too_late(tiny) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        busy, full, other = await opened(engine, 3, policy=lenient())
        launches.fails = is_poisoned
        await busy.append([POISON] * 15)
        launches.hold()
        step = asyncio.create_task(other.append([3]))
        await launches.until_held()
        assert await full.append(ids(9), timeout_s=0.01) == []
        assert full.verdict.rule == "timeout"  # as far as one can tell
        launches.may_run.set()
        await step
        await settled(engine)
        assert full.token_ids == [1, 3]
        assert full.verdict.rule == "overload"
        assert (await failures(engine)) == {"error-closed": 1, "overload-closed": 1}

    with_engine(tiny, use, max_pending_tokens=20)


def test_too_many_appends_are_refused_at_once(tiny) -> None:
    async def use(engine: AsyncEngine, launches: Launches) -> None:
        (stream,) = await opened(engine, 1)
        launches.hold()
        first = asyncio.create_task(stream.append([3]))
        await launches.until_held()
        waiting = [asyncio.create_task(stream.append([4 + i])) for i in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="max_waiting=3"):
            await stream.append([9])
        launches.may_run.set()
        await asyncio.gather(first, *waiting)
        assert stream.token_ids == [1, 2, 3, 4, 5, 6]

    with_engine(tiny, use, max_waiting=3)
