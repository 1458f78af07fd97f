"""Idle streams lose their KV blocks when others need them, and nothing else: the same labels, none twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import bits, by_stream, engine_over, ids

from guardengine import Engine, Overloaded, Policy, Stream, StreamTooLong

BLOCK = 4


@pytest.fixture(scope="module")
def loaded(checkpoints: Callable[..., Path]) -> Iterator[Engine]:
    folder = checkpoints(vocab_size=512, dtype="float32", num_hidden_layers=2)
    with Engine.from_pretrained(folder, kv_cache_bytes=2**19, max_model_len=128, block_size=BLOCK) as engine:
        yield engine


@pytest.fixture(params=[True, False], ids=["cache", "no cache"])
def make(loaded: Engine, request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def engine(num_blocks: int, **options: Any) -> Engine:
        made.append(engine_over(loaded, num_blocks=num_blocks, prefix_caching=request.param, **options))
        return made[-1]

    yield engine
    for one in made:
        one.check_integrity()
        one.close()
        assert one.core.pool.num_free == one.core.pool.num_blocks


def idle_stream(engine: Engine, seed: int, length: int = 8) -> Stream:
    stream = engine.open(token_ids=ids(length, seed), role="assistant")
    engine.run()
    return stream


def is_resident(stream: Stream) -> bool:
    return bool(stream._state.block_table)


def preempt(engine: Engine, *streams: Stream) -> None:
    """Make the streams lose their blocks, and what was cached of them."""
    room = engine.core.pool.num_blocks * BLOCK
    with engine.open(token_ids=ids(room, seed=99)):
        assert not any(is_resident(stream) for stream in streams)
        engine.run()
    if engine.core.pool.cache is not None:
        with engine.open(token_ids=ids(room, seed=98)):
            engine.run()


@pytest.fixture(scope="module")
def undisturbed(checkpoints: Callable[..., Path]) -> Iterator[Callable[[list[list[int]]], list[Any]]]:
    """The labels of one stream that is alone in another engine and gets these tokens one list after the other."""
    folder = checkpoints(vocab_size=512, dtype="float32", num_hidden_layers=2)
    with Engine.from_pretrained(
        folder, kv_cache_bytes=2**18, max_model_len=128, prefix_caching=False
    ) as alone:

        def labels(steps: list[list[int]]) -> list[Any]:
            with alone.open(token_ids=steps[0], role="assistant") as stream:
                for more in steps[1:]:
                    alone.run()
                    stream.append(more)
                alone.run()
                return [bits(label) for label in stream.labels]

        yield labels


def test_the_least_recently_active_goes_first(make) -> None:
    engine = make(6)
    first, second, third = (idle_stream(engine, seed) for seed in range(3))
    third.append([1])  # no room in its blocks: takes the first's
    assert [is_resident(stream) for stream in (first, second, third)] == [False, True, True]
    engine.run()
    second.append([1])
    assert engine.stats()["preemptions"] == 1  # there is one block left of the first's
    engine.run()
    first.append([1])
    assert [is_resident(stream) for stream in (first, second, third)] == [True, True, False]
    engine.run()
    assert engine.stats()["preemptions"] == 2


def test_streams_with_pending_tokens_are_never_preempted(make) -> None:
    engine = make(6)
    busy = [engine.open(token_ids=ids(8, seed)) for seed in range(2)]
    idle = idle_stream(engine, 2)
    for stream in busy:
        stream.append([1, 2])
    with pytest.raises(Overloaded, match="KV cache blocks"):
        engine.open(token_ids=ids(4, seed=3))
    assert all(is_resident(stream) for stream in busy)
    assert not is_resident(idle)
    engine.run()
    assert is_resident(engine.open(token_ids=ids(4, seed=3)))


def test_labels_are_the_same_and_come_once(undisturbed, make) -> None:
    engine, steps = make(8), [ids(10), ids(3, seed=1), ids(1, seed=2), ids(9, seed=3)]
    stream = engine.open(token_ids=steps[0], role="assistant")
    labels = engine.run()
    for more in steps[1:]:
        preempt(engine, stream)
        kept = stream.labels
        stream.append(more)
        assert stream.num_pending_tokens == len(stream.token_ids)
        labels += [label for label in engine.run() if label.stream_id == stream.stream_id]
        assert stream.labels[: len(kept)] == kept
    assert [label.position for label in labels] == list(range(23))
    assert stream.labels == labels
    assert [bits(label) for label in labels] == undisturbed(steps)
    assert stream.verdict == Policy.strict().judge(labels)


def test_a_preempted_stream_is_idle_and_whole(make) -> None:
    engine = make(4)
    stream = idle_stream(engine, 0)
    before = (stream.token_ids, stream.labels, stream.verdict)
    preempt(engine, stream)
    assert (stream.token_ids, stream.labels, stream.verdict) == before
    assert stream.num_pending_tokens == 0
    assert engine.step() == []
    stats = engine.stats()
    assert (stats["streams_open"], stats["streams_idle"], stats["tokens_pending"]) == (1, 1, 0)


@pytest.mark.parametrize("num_dropped", [0, 1, 4, 5, 8])
def test_rollback_and_fork_of_a_preempted_stream(undisturbed, make, num_dropped: int) -> None:
    engine = make(8)
    stream = idle_stream(engine, 0)
    preempt(engine, stream)
    stream.rollback(num_dropped)
    engine.check_integrity()
    branch = stream.fork()
    engine.check_integrity()
    assert engine.run() == []
    kept = ids(8)[: 8 - num_dropped]
    for one, more in ((stream, [5, 6]), (branch, [7])):
        one.append(more)
        engine.check_integrity()
        labels = by_stream(engine.run())[one.stream_id]
        expected = undisturbed([kept, more] if kept else [more])
        assert labels == expected[len(kept) :]
        assert [bits(label) for label in one.labels] == expected


@pytest.mark.parametrize("budget", [1, 3, 2048])
def test_changes_while_a_stream_is_computed_again(undisturbed, make, budget: int) -> None:
    engine = make(10, max_num_batched_tokens=budget)
    stream = idle_stream(engine, 0)
    preempt(engine, stream)
    stream.append([1, 2, 3])
    engine.step()
    engine.check_integrity()
    branch = stream.fork()
    engine.check_integrity()
    engine.step()
    stream.rollback(3)  # all that it had left to do
    engine.check_integrity()
    assert stream.num_pending_tokens == 0
    stream.append([4])
    engine.check_integrity()
    engine.run()
    assert [bits(label) for label in stream.labels] == undisturbed([ids(8), [4]])
    assert [bits(label) for label in branch.labels] == undisturbed([ids(8), [1, 2, 3]])


def test_closing_a_preempted_stream(make) -> None:
    engine = make(4)
    stream = idle_stream(engine, 0)
    preempt(engine, stream)
    stream.close()
    assert engine.stats()["kv_blocks_free"] == 4


def test_what_is_still_cached_is_not_computed_again(loaded: Engine, undisturbed) -> None:
    engine = engine_over(loaded, num_blocks=6)
    stream, other = idle_stream(engine, 0, length=16), idle_stream(engine, 1)
    with engine.open(token_ids=ids(4, seed=2)):  # the end of the first's goes
        engine.run()
    other.close()
    before = engine.stats()["tokens_computed"]
    stream.append([1])
    engine.run()
    assert engine.stats()["tokens_computed"] - before == 5
    assert [bits(label) for label in stream.labels] == undisturbed([ids(16), [1]])


def test_a_refused_append_leaves_a_preempted_stream_as_it_was(undisturbed, make) -> None:
    engine = make(6)
    stream = idle_stream(engine, 0, length=16)
    preempt(engine, stream)
    busy = engine.open(token_ids=ids(8, seed=1))
    with pytest.raises(Overloaded):
        stream.append([1, 2])
    engine.check_integrity()
    assert (stream.token_ids, stream.num_pending_tokens) == (ids(16), 0)
    busy.close()
    stream.append([1, 2])
    engine.run()
    assert [bits(label) for label in stream.labels] == undisturbed([ids(16), [1, 2]])


def test_a_failed_copy_leaves_the_queue_and_the_idle_streams_whole(make) -> None:
    engine = make(8)
    stream = idle_stream(engine, 0, length=6)
    branch = stream.fork()
    engine.core.runner.faults.plant("copy_block", MemoryError("planted"))
    with pytest.raises(MemoryError):
        branch.append([1])
    engine.check_integrity()
    assert engine.stats()["streams_idle"] == 2
    branch.append([1])
    assert [label.position for label in engine.run()] == [6]


# -- limits of memory ------------------------------------------------------------------------------------------


def test_the_cache_never_grows(make) -> None:
    engine = make(12)
    before = engine.stats()["kv_cache_bytes"]
    streams = [idle_stream(engine, seed, length=12) for seed in range(12)]
    assert engine.stats()["streams_open"] == 12  # with room for four of them
    for seed in range(3):
        for stream in streams:
            stream.append(ids(1, seed))
            engine.step()
    engine.run()
    assert all(len(stream.labels) == 15 for stream in streams)
    stats = engine.stats()
    assert (stats["kv_cache_bytes"], stats["kv_blocks_total"]) == (before, 12)
    assert stats["preemptions"] >= 8


@pytest.mark.parametrize(("length", "fits"), [(24, True), (25, False), (64, False)])
def test_a_stream_that_can_never_fit_is_refused_at_open(make, length: int, fits: bool) -> None:
    engine = make(8, kv_reserve=0.25)  # two blocks of eight are not for new streams
    if fits:
        engine.open(token_ids=ids(length))
        return
    with pytest.raises(StreamTooLong, match="kv_cache_bytes"):
        engine.open(token_ids=ids(length))
    assert engine.stats()["streams_open"] == 0


def test_an_open_stream_may_grow_into_the_reserve_and_no_further(make) -> None:
    engine = make(8, kv_reserve=0.25)
    stream = engine.open(token_ids=ids(24), role="assistant")
    with pytest.raises(Overloaded, match="kv_reserve"):
        engine.open(token_ids=[1])
    stream.append(ids(8, seed=1))
    with pytest.raises(StreamTooLong, match="kv_cache_bytes"):
        stream.append([1])
    assert len(engine.run()) == 32


def test_the_reserve_is_kept_for_those_that_are_open(make) -> None:
    engine = make(10, kv_reserve=0.2)
    busy = [engine.open(token_ids=ids(4, seed)) for seed in range(8)]
    with pytest.raises(Overloaded, match="2 of them kept for open streams"):
        engine.open(token_ids=[1])
    with pytest.raises(Overloaded, match="kv_reserve"):
        busy[0].fork()  # pending: it would need a block of its own
    for stream in busy[:2]:
        stream.append([1])
    with pytest.raises(Overloaded):
        busy[2].append([1])
    assert len(engine.run()) == 10


def test_what_is_found_is_taken_from_the_reserve_no_more_than_what_is_computed(loaded: Engine) -> None:
    engine = engine_over(loaded, num_blocks=10, kv_reserve=0.2)
    with engine.open(token_ids=ids(8), role="assistant"):
        engine.run()
    busy = [engine.open(token_ids=ids(4, seed)) for seed in range(1, 8)]
    with pytest.raises(Overloaded, match="kv_reserve"):
        engine.open(token_ids=ids(8), role="assistant")  # nothing to compute, but two blocks to hold
    engine.check_integrity()
    busy.pop().close()
    engine.open(token_ids=ids(8), role="assistant")
    engine.check_integrity()


def test_a_long_conversation_is_not_locked_out_by_limits_on_pending_tokens(make) -> None:
    """Its tokens were accepted long ago: losing their keys and values is not its doing."""
    engine = make(8, max_pending_tokens=10, max_pending_tokens_per_tenant=10)
    stream = idle_stream(engine, 0)
    stream.append(ids(8, seed=1))
    engine.run()
    preempt_by = [engine.open(token_ids=ids(8, seed=2)), engine.open(token_ids=[1])]
    preempt_by[0].append([1])
    engine.run()
    for other in preempt_by:
        other.append(ids(4, seed=5))
        engine.run()
        other.append(ids(8, seed=6))
        engine.run()
    assert not is_resident(stream)
    stream.append([1])
    assert [label.position for label in engine.run()] == [16]


@pytest.mark.slow
def test_moderating_whole_conversations_takes_the_room_of_idle_streams(checkpoints) -> None:
    folder = checkpoints(dtype="float32")
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "No."}]
    with Engine.from_pretrained(folder, kv_cache_bytes=2**17, max_model_len=64, block_size=BLOCK) as engine:
        idle = []
        while engine.stats()["kv_blocks_free"] > 4:
            idle.append(idle_stream(engine, len(idle)))
        branches = [stream.fork() for stream in idle[:5]]
        [alone] = engine.moderate_many([messages])
        crowd = engine.moderate_many([messages] * 20)
        assert {tuple(bits(label) for label in one.labels) for one in crowd} == {
            tuple(bits(label) for label in alone.labels)
        }
        for stream in (*idle, *branches):
            stream.append([1])
            assert [label.position for label in engine.run()] == [8]
        engine.check_integrity()


def test_forks_whose_blocks_a_busy_stream_shares_are_no_room(make) -> None:
    engine = make(5)
    parent = idle_stream(engine, 0, length=16)
    branches = [parent.fork() for _ in range(3)]
    parent.append([1])
    with pytest.raises(Overloaded):
        engine.open(token_ids=[1])
    engine.check_integrity()
    engine.run()
    for branch in branches:
        branch.append([1])
        labels = engine.run()
        assert [bits(label)[1:] for label in labels] == [bits(parent.labels[-1])[1:]]
