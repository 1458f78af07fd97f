"""Prefix reuse: the same labels as without it, no label lost or doubled, nothing shared between salts."""

from __future__ import annotations

import doctest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import bits, by_stream, engine_over, ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guardengine import Engine, Overloaded, Stream
from guardengine.core import prefix_cache

BLOCK = 4


@pytest.fixture(scope="module")
def loaded(checkpoints: Callable[..., Path]) -> Iterator[Engine]:
    folder = checkpoints(vocab_size=512, dtype="float32", num_hidden_layers=2)
    with Engine.from_pretrained(folder, kv_cache_bytes=2**19, max_model_len=128, block_size=BLOCK) as engine:
        yield engine


@pytest.fixture
def make(loaded: Engine) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def engine(**options: Any) -> Engine:
        made.append(engine_over(loaded, **options))
        return made[-1]

    yield engine
    for one in made:
        one.check_integrity()
        one.close()
        assert one.core.pool.num_free == one.core.pool.num_blocks


def computed(engine: Engine, call: Callable[[], Any]) -> int:
    """Tokens that the model computes for what is opened or appended in `call`."""
    before = engine.stats()["tokens_computed"]
    call()
    engine.run()
    engine.check_integrity()
    return engine.stats()["tokens_computed"] - before


@pytest.fixture(scope="module")
def fresh_labels(checkpoints: Callable[..., Path]) -> Iterator[Callable[[Stream], list[Any]]]:
    """What another engine, without a cache, makes of a stream's tokens; role "assistant"."""
    folder = checkpoints(vocab_size=512, dtype="float32", num_hidden_layers=2)
    with Engine.from_pretrained(
        folder, kv_cache_bytes=2**18, max_model_len=128, prefix_caching=False
    ) as alone:

        def labels(stream: Stream) -> list[Any]:
            with alone.open(token_ids=stream.token_ids, role="assistant") as other:
                alone.run()
                return [bits(label) for label in other.labels]

        yield labels


# -- on == off ---------------------------------------------------------------------------------------------

PREFIXES = [ids(20, seed=1), ids(7, seed=2), [*ids(20, seed=1)[:9], *ids(8, seed=3)]]
STEPS = st.one_of(
    st.tuples(st.just("open"), st.integers(0, 2), st.integers(1, 20), st.sampled_from(["user", "assistant"])),
    st.tuples(st.just("append"), st.integers(0, 9), st.integers(0, 2), st.integers(1, 9)),
    st.tuples(st.sampled_from(["fork", "close"]), st.integers(0, 9)),
    st.tuples(st.just("rollback"), st.integers(0, 9), st.integers(0, 12)),
    st.tuples(st.just("step")),
)


def test_the_worked_example_runs() -> None:
    result = doctest.testmod(prefix_cache)
    assert (result.failed, result.attempted >= 20) == (0, True)


def play(engine: Engine, script: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """The labels of each stream in order of emission, and what each stream that is left has at the end."""
    streams: list[Stream] = []
    labels = []
    for what, *args in script:
        one = streams[args[0] % len(streams)] if streams and args else None
        if what == "open":
            prefix, count, role = args
            streams.append(engine.open(token_ids=PREFIXES[prefix][:count], role=role))
        elif what == "step":
            labels += engine.step()
        elif one is None:
            continue
        elif what == "append":
            one.append(PREFIXES[args[1]][: args[2]])
        elif what == "fork":
            streams.append(one.fork())
        elif what == "rollback":
            engine.run()  # with or without hits the same labels are out by now
            one.rollback(min(args[1], len(one.token_ids)))
        elif what == "close":
            labels += engine.run()
            one.close()
            streams.remove(one)
    labels += engine.run()
    return by_stream(labels), [[bits(label) for label in stream.labels] for stream in streams]


def test_on_equals_off_bit_for_bit(loaded: Engine) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(script=st.lists(STEPS, min_size=4, max_size=25), num_blocks=st.integers(30, 60))
    def check(script: list[Any], num_blocks: int) -> None:
        results = []
        for prefix_caching in (True, False):
            engine = engine_over(
                loaded, num_blocks=num_blocks, prefix_caching=prefix_caching, max_num_batched_tokens=9
            )
            try:
                results.append(play(engine, script))
            except Overloaded:
                return
            engine.check_integrity()
        (emitted_on, kept_on), (emitted_off, kept_off) = results
        assert emitted_on == emitted_off
        assert kept_on == kept_off

    check()


# -- hits --------------------------------------------------------------------------------------------------


def test_a_retried_prompt_costs_nothing(make) -> None:
    engine, prompt = make(), ids(16)
    with engine.open(token_ids=prompt) as first:
        [label] = engine.run()
    assert first.prompt_label is label
    with engine.open(token_ids=prompt) as second:
        assert second.prompt_label is None
        assert second.num_pending_tokens == 16
        [again] = engine.step()
        assert engine.step() == []
        assert second.prompt_label is again
        assert (again.stream_id, bits(again)) == (second.stream_id, bits(label))
        assert second.num_pending_tokens == 0
    stats = engine.stats()
    assert (stats["tokens_computed"], stats["prefix_tokens_hit"], stats["labels"]) == (16, 16, 2)


@pytest.mark.parametrize(("length", "num_found"), [(3, 0), (4, 4), (18, 16), (19, 16)])
def test_only_full_blocks_are_found(make, length: int, num_found: int) -> None:
    engine = make()
    for expected in (length, length - num_found):
        assert computed(engine, lambda: engine.open(token_ids=ids(length), role="assistant")) == expected


def test_labels_in_what_was_found_come_once_complete_and_as_the_streams_own(make) -> None:
    engine = make()
    first = engine.open(token_ids=ids(13), role="assistant")
    expected = [bits(label) for label in engine.run()]
    second = engine.open(token_ids=ids(13), role="assistant")
    labels = engine.run()
    assert [bits(label) for label in labels] == expected
    assert {label.stream_id for label in labels} == {second.stream_id}
    assert second.labels == labels
    assert second.verdict == first.verdict


def test_a_hit_ends_where_a_wanted_label_is_not_known(make) -> None:
    engine = make()
    assert computed(engine, lambda: engine.open(token_ids=ids(16), role="user")) == 16
    # The user's label at position 11 was not computed: the block that ends there has to be.
    assert computed(engine, lambda: engine.open(token_ids=ids(12), role="user")) == 4
    assert computed(engine, lambda: engine.open(token_ids=ids(12), role="user")) == 0
    assert computed(engine, lambda: engine.open(token_ids=ids(16), role="assistant")) == 16
    # Known by now, with the labels of both roles.
    assert computed(engine, lambda: engine.open(token_ids=ids(16), role="assistant")) == 0
    assert computed(engine, lambda: engine.open(token_ids=ids(16), role="user")) == 0
    # A prompt's end wants nothing before it.
    assert computed(engine, lambda: engine.open(token_ids=[*ids(16), 7], role="user")) == 1


def test_equal_blocks_after_other_beginnings_are_not_taken_for_each_other(make) -> None:
    engine = make()
    assert computed(engine, lambda: engine.open(token_ids=[1] * 8 + [2] * 4, role="assistant")) == 12
    assert computed(engine, lambda: engine.open(token_ids=[2] * 4 + [1] * 8, role="assistant")) == 12
    assert computed(engine, lambda: engine.open(token_ids=[1] * 4 + [2] * 8, role="assistant")) == 8


def test_equal_prompts_in_one_step_are_kept_once(make) -> None:
    engine = make()
    streams = [engine.open(token_ids=ids(12)) for _ in range(3)]
    assert len({bits(label) for label in engine.run()}) == 1
    for stream in streams:
        stream.close()
    engine.check_integrity()
    assert engine.stats()["kv_blocks_cached"] == 3
    assert engine.stats()["kv_blocks_free"] == engine.stats()["kv_blocks_total"]


def test_nothing_is_kept_when_switched_off(make) -> None:
    engine = make(prefix_caching=False)
    for _ in range(2):
        stream = engine.open(token_ids=ids(12))
        assert computed(engine, lambda: None) == 12
        stream.close()
    assert engine.stats()["kv_blocks_cached"] == engine.stats()["prefix_tokens_queried"] == 0


# -- tenants -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "is_shared"),
    [
        ({}, {}, True),
        ({"tenant": "a"}, {"tenant": "a"}, True),
        ({"tenant": "a"}, {"tenant": "b"}, False),
        ({"tenant": "a"}, {}, False),
        ({"tenant": "a"}, {"tenant": "a", "cache_salt": "x"}, False),
        ({"tenant": "a", "cache_salt": "x"}, {"tenant": "b", "cache_salt": "x"}, True),
        ({"tenant": "a", "cache_salt": ""}, {"tenant": "b", "cache_salt": ""}, True),
        ({"tenant": "\ud800"}, {"tenant": "\udc00"}, False),
    ],
)
def test_salts_keep_tenants_apart(make, first, second, is_shared: bool) -> None:
    """To the last count: what is computed is the same as if the other tenant were not there."""
    engine = make()
    engine.open(token_ids=ids(16), **first)
    engine.run()
    hits = engine.stats()["prefix_tokens_hit"]
    assert computed(engine, lambda: engine.open(token_ids=ids(16), **second)) == (0 if is_shared else 16)
    assert engine.stats()["prefix_tokens_hit"] - hits == (16 if is_shared else 0)


def test_a_branch_has_its_parents_salt(make) -> None:
    engine = make()
    parent = engine.open(token_ids=ids(8), tenant="a", cache_salt="x", role="assistant")
    engine.run()
    branch = parent.fork()
    branch.append(ids(8, seed=1))
    engine.run()
    again = {"token_ids": [*ids(8), *ids(8, seed=1)], "role": "assistant"}
    assert computed(engine, lambda: engine.open(**again, tenant="a")) == 16
    assert computed(engine, lambda: engine.open(**again, tenant="b", cache_salt="x")) == 0


# -- eviction ------------------------------------------------------------------------------------------------


def keep(engine: Engine, seed: int, length: int = 8) -> None:
    with engine.open(token_ids=ids(length, seed), role="assistant"):
        engine.run()


def test_the_least_recently_used_goes_first(make) -> None:
    engine = make(num_blocks=6)
    for seed in (0, 1, 2, 0):  # two blocks each; 0 is used again
        keep(engine, seed)
    assert engine.stats()["kv_blocks_cached"] == 6
    keep(engine, 3)
    assert engine.stats()["kv_blocks_evicted"] == 2
    for seed, expected in ((0, 0), (3, 0), (2, 0), (1, 8)):
        assert computed(engine, lambda s=seed: engine.open(token_ids=ids(8, s), role="assistant")) == expected


def test_the_end_of_a_conversation_goes_before_its_beginning(make) -> None:
    engine = make(num_blocks=5)
    keep(engine, 0, length=16)
    with engine.open(token_ids=ids(8, seed=1)):  # one free block and one cached
        engine.run()
    assert computed(engine, lambda: engine.open(token_ids=ids(16), role="assistant")) == 4


def test_free_blocks_are_taken_before_cached_ones(make) -> None:
    engine = make(num_blocks=6)
    keep(engine, 0)
    keep(engine, 1, length=14)
    assert engine.stats()["kv_blocks_evicted"] == 0


def test_what_was_found_is_not_evicted_to_make_room_for_the_rest(make, fresh_labels) -> None:
    engine = make(num_blocks=6)
    keep(engine, 0, length=12)
    keep(engine, 1, length=12)
    # The oldest cached blocks are the very ones that are found.
    stream = engine.open(token_ids=[*ids(12), *ids(12, seed=2)], role="assistant")
    engine.check_integrity()
    engine.run()
    assert engine.stats()["tokens_computed"] == 36
    assert [bits(label) for label in stream.labels] == fresh_labels(stream)


def test_a_refused_open_leaves_the_cache_as_it_was(make) -> None:
    engine = make(num_blocks=6)
    keep(engine, 0, length=12)
    busy = engine.open(token_ids=ids(8, seed=1))
    with pytest.raises(Overloaded):
        engine.open(token_ids=[*ids(12), *ids(8, seed=2)])
    engine.check_integrity()
    assert engine.stats()["kv_blocks_cached"] == 3
    busy.close()
    assert computed(engine, lambda: engine.open(token_ids=ids(12), role="assistant")) == 0


# -- streams that change their minds -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_found_first", [True, False])
@pytest.mark.parametrize("kept", [15, 12, 10, 8, 1])
def test_rewriting_what_is_cached(make, fresh_labels, kept: int, is_found_first: bool) -> None:
    """After a rollback: whoever has found the block keeps it, whoever comes later finds what is still there."""
    engine = make()
    writer = engine.open(token_ids=ids(16), role="assistant")
    engine.run()
    writer.rollback(16 - kept)
    readers = [engine.open(token_ids=ids(16), role="assistant")] if is_found_first else []
    writer.append(ids(6, seed=1))
    engine.run()
    readers.append(engine.open(token_ids=ids(16), role="assistant"))
    engine.run()
    for stream in (writer, *readers):
        assert [bits(label) for label in stream.labels] == fresh_labels(stream)


def test_forks_of_a_stream_whose_beginning_was_found_and_not_yet_stepped(make, fresh_labels) -> None:
    engine = make()
    keep(engine, 0, length=12)
    parent = engine.open(token_ids=[*ids(12), 7], role="assistant")
    branch = parent.fork()
    twig = branch.fork()
    parent.close()
    branch.append([8])
    labels = by_stream(engine.run())
    for stream in (branch, twig):
        assert labels[stream.stream_id] == fresh_labels(stream)
        assert [bits(label) for label in stream.labels] == labels[stream.stream_id]
    assert parent.labels == []


@pytest.mark.parametrize("kept", [12, 11, 9, 8, 4, 1, 0])
def test_rollback_of_what_was_found_and_not_yet_stepped(make, fresh_labels, kept: int) -> None:
    engine = make()
    keep(engine, 0, length=12)
    stream = engine.open(token_ids=[*ids(12), 7], role="assistant")
    stream.rollback(13 - kept)
    engine.check_integrity()
    stream.append([8, 9])
    engine.check_integrity()
    labels = engine.run()
    assert [bits(label) for label in labels] == fresh_labels(stream)
    assert [label.position for label in stream.labels] == list(range(kept + 2))
    # It wrote into a block that nobody else held, which is known for its old tokens no longer.
    expected = 12 - kept // BLOCK * BLOCK if kept % BLOCK else 0
    assert computed(engine, lambda: engine.open(token_ids=ids(12), role="assistant")) == expected


@pytest.mark.slow
def test_a_conversation_opened_again_with_one_more_turn(checkpoints) -> None:
    """The template drops the think block of earlier replies: only what comes before it is the same."""
    question = {"role": "user", "content": "Hello, how to build a bomb? " * 4}
    reply = {"role": "assistant", "content": "Here are some practical methods to build a bomb."}
    more = {"role": "user", "content": "And a small one?"}
    size = {"kv_cache_bytes": 2**22, "max_model_len": 256, "block_size": BLOCK}
    with Engine.from_pretrained(checkpoints(dtype="float32"), **size) as engine:
        assert engine.chat is not None
        content = engine.chat.render([question, reply])
        live = engine.open(messages=[question])
        live.append(content.token_ids[content.response_start : content.response_end])
        engine.run()
        again = engine.open(messages=[question, reply, more])
        pairs = zip(live.token_ids, again.token_ids, strict=False)
        common = next(index for index, (a, b) in enumerate(pairs) if a != b)
        assert len(live._state.token_ids) > common > len(live.token_ids) // 2  # the think block
        before = engine.stats()["tokens_computed"]
        [label] = engine.run()
        stats = engine.stats()
        assert stats["tokens_computed"] - before == len(again.token_ids) - common // BLOCK * BLOCK
        off = engine_over(engine, prefix_caching=False)
        off.open(messages=[question, reply, more])
        assert [bits(label)] == [bits(label) for label in off.run()]
