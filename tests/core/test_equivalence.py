"""However a conversation is fed, its labels are the same: one-shot, chunked, token by token, interleaved, forked,
rolled back. Each way is compared with a fresh one-shot run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from feeding import ids
from native_ops import HOST_BACKENDS

from guardengine import Engine, Label, Stream


def assert_same(actual: list[Label], expected: list[Label]) -> None:
    assert [(x.role, x.position, x.token_id) for x in actual] == [
        (x.role, x.position, x.token_id) for x in expected
    ]
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a.risk_logits, e.risk_logits, atol=1e-4)
        np.testing.assert_allclose(a.category_logits, e.category_logits, atol=1e-4)
        assert (a.risk, a.category) == (e.risk, e.category)


@pytest.fixture(scope="module", params=HOST_BACKENDS)
def make_engine(request: pytest.FixtureRequest, tiny: Path):
    def make(**limits) -> Engine:
        limits = {"kv_cache_bytes": 2**23, "max_model_len": 512, "block_size": 4} | limits
        return Engine.from_pretrained(tiny, backend=request.param, **limits)

    return make


@pytest.fixture
def engine(make_engine) -> Iterator[Engine]:
    with make_engine() as engine:
        yield engine
        engine.check_integrity()


def everything(stream: Stream) -> list[Label]:
    assert stream.prompt_label is not None
    return [stream.prompt_label, *stream.labels]


def one_shot(engine: Engine, prompt: list[int], response: list[int]) -> list[Label]:
    with engine.open(token_ids=prompt) as stream:
        if response:
            stream.append(response)
        engine.run()
        return everything(stream)


@pytest.mark.parametrize("k", [1, 2, 3, 7, 16, 100])
def test_appends_of_any_size_equal_one_shot(engine: Engine, k: int) -> None:
    prompt, response = ids(37, 1), ids(50, 2)
    expected = one_shot(engine, prompt, response)
    with engine.open(token_ids=prompt) as stream:
        emitted = engine.run()
        for start in range(0, len(response), k):
            stream.append(response[start : start + k])
            emitted += engine.step()
        assert_same(everything(stream), expected)
        assert emitted == everything(stream)


@pytest.mark.parametrize("budget", [1, 5, 16, 33])
def test_chunked_prefill_equals_one_shot(engine: Engine, make_engine, budget: int) -> None:
    prompt, response = ids(40, 3), ids(9, 4)
    with make_engine(max_num_batched_tokens=budget) as chunked:
        assert_same(one_shot(chunked, prompt, response), one_shot(engine, prompt, response))
        assert chunked.stats()["steps"] == -(-49 // budget)


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_block_size_does_not_show(engine: Engine, make_engine, block_size: int) -> None:
    prompt, response = ids(40, 3), ids(20, 4)
    with make_engine(block_size=block_size) as other:
        assert_same(one_shot(other, prompt, response), one_shot(engine, prompt, response))


def test_interleaved_streams_equal_each_alone(engine: Engine) -> None:
    rng = random.Random(5)
    texts = [(ids(rng.randint(1, 60), 10 + i), ids(rng.randint(1, 40), 50 + i)) for i in range(12)]
    expected = [one_shot(engine, *text) for text in texts]
    streams = [engine.open(token_ids=prompt) for prompt, _ in texts]
    left = [response for _, response in texts]
    while any(left) or engine.stats()["tokens_pending"]:
        for index, stream in enumerate(streams):
            if left[index] and rng.random() < 0.7:
                k = rng.randint(1, 5)
                stream.append(left[index][:k])
                left[index] = left[index][k:]
        engine.step()
        engine.check_integrity()
    for stream, labels in zip(streams, expected, strict=True):
        assert_same(everything(stream), labels)
        stream.close()


@pytest.mark.parametrize("computed", [True, False])
@pytest.mark.parametrize("length", [7, 8, 9])  # around a block's edge
def test_fork_equals_fresh_recompute(engine: Engine, computed: bool, length: int) -> None:
    prompt, shared, left, right = ids(length, 1), ids(3, 2), ids(9, 3), ids(11, 4)
    with engine.open(token_ids=prompt) as stream:
        stream.append(shared)
        if computed:
            engine.run()
        with stream.fork() as branch:
            engine.check_integrity()
            stream.append(left)
            branch.append(right)
            engine.run()
            assert_same(everything(stream), one_shot(engine, prompt, shared + left))
            assert_same(everything(branch), one_shot(engine, prompt, shared + right))


def test_fork_in_the_middle_of_a_prompt(make_engine) -> None:
    prompt = ids(21, 1)
    with make_engine(max_num_batched_tokens=6) as engine:
        stream = engine.open(token_ids=prompt)
        engine.step()
        branch = stream.fork()
        engine.check_integrity()
        branch.append(ids(5, 2))
        engine.run()
        branch_labels, labels = everything(branch), stream.prompt_label
        assert_same(branch_labels, one_shot(engine, prompt, ids(5, 2)))
        assert_same([labels], one_shot(engine, prompt, []))


def test_a_branch_outlives_its_parent(engine: Engine) -> None:
    prompt, tail = ids(10, 1), ids(6, 2)
    stream = engine.open(token_ids=prompt)
    engine.run()
    branch = stream.fork()
    stream.close()
    crowd = [engine.open(token_ids=ids(30, 60 + i)) for i in range(3)]  # would overwrite freed blocks
    engine.run()
    branch.append(tail)
    engine.run()
    assert_same(everything(branch), one_shot(engine, prompt, tail))
    for other in (*crowd, branch):
        other.close()


@pytest.mark.parametrize("dropped", [1, 2, 3, 5, 12, 20])
@pytest.mark.parametrize("computed", [True, False])
def test_rollback_equals_fresh_recompute(engine: Engine, dropped: int, computed: bool) -> None:
    prompt, response, again = ids(9, 1), ids(20, 2), ids(7, 3)
    with engine.open(token_ids=prompt) as stream:
        stream.append(response)
        if computed:
            engine.run()
        stream.rollback(dropped)
        engine.check_integrity()
        assert stream.token_ids == prompt + response[: 20 - dropped]
        stream.append(again)
        engine.run()
        assert_same(everything(stream), one_shot(engine, prompt, response[: 20 - dropped] + again))


def test_rollback_of_a_parent_leaves_its_branch_alone(engine: Engine) -> None:
    prompt, response, other = ids(6, 1), ids(7, 2), ids(7, 3)
    with engine.open(token_ids=prompt) as stream:
        stream.append(response)
        engine.run()
        with stream.fork() as branch:
            stream.rollback(5)  # into a block that the branch still reads
            stream.append(other)
            engine.run()
            branch.append(ids(3, 4))
            engine.run()
            assert_same(everything(branch), one_shot(engine, prompt, response + ids(3, 4)))
            assert_same(everything(stream), one_shot(engine, prompt, response[:2] + other))


def test_rollback_into_a_prompt_takes_its_label_away(engine: Engine) -> None:
    with engine.open(token_ids=ids(9, 1)) as stream:
        engine.run()
        assert stream.prompt_label is not None
        stream.rollback(2)
        assert stream.prompt_label is None
        stream.append(ids(4, 2), role="user")
        assert_same(engine.run(), one_shot(engine, ids(9, 1)[:7] + ids(4, 2), []))


def test_a_further_user_turn_has_its_own_prompt_label(engine: Engine) -> None:
    first, reply, second = ids(9, 1), ids(5, 2), ids(8, 3)
    with engine.open(token_ids=first) as stream:
        stream.append(reply)
        engine.run()
        stream.append(second, role="user")
        assert stream.prompt_label is None
        engine.run()
        assert_same([stream.prompt_label], one_shot(engine, first + reply + second, []))
        assert len(stream.labels) == 5


def test_freed_blocks_hold_nothing_that_later_streams_read(engine: Engine) -> None:
    """The cache is poisoned with NaN: whatever is read before it is written shows."""
    engine.core.runner.kv_cache.values.fill_(float("nan"))
    for label in one_shot(engine, ids(33, 1), ids(10, 2)):
        assert np.isfinite(label.risk_logits).all()
        assert np.isfinite(label.category_logits).all()
