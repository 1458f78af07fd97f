"""Who may open and append: places, pending tokens, tenants, idle time. Bad values are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from fakes import Clock, engine_over, ids, state_of

from guardengine import (
    ConfigError,
    Engine,
    EngineConfig,
    GuardEngineError,
    IntegrityError,
    Overloaded,
    StreamClosed,
    StreamTooLong,
)
from guardengine.core.admission import Admission


@pytest.fixture
def make(engine: Engine) -> Callable[..., Engine]:
    return lambda **options: engine_over(engine, **options)


# -- places ------------------------------------------------------------------------------------------------


def test_a_tenants_places_are_its_own(make) -> None:
    engine = make(max_streams_per_tenant=2)
    first, _ = engine.open(token_ids=[1], tenant="a"), engine.open(token_ids=[1], tenant="a")
    for call in (lambda: engine.open(token_ids=[1], tenant="a"), first.fork):
        with pytest.raises(Overloaded, match=r"tenant 'a' has 2 streams open, max_streams_per_tenant=2"):
            call()
    others = [engine.open(token_ids=[1], tenant="b"), engine.open(token_ids=[1])]
    assert engine.stats()["refused"] == 2
    first.close()
    engine.open(token_ids=[1], tenant="a")
    with pytest.raises(Overloaded):
        engine.open(token_ids=[1], tenant="a")
    others[1].fork()
    with pytest.raises(Overloaded, match="tenant ''"):
        engine.open(token_ids=[1])
    engine.check_integrity()


def test_refused_opens_take_no_place(make) -> None:
    engine = make(max_streams_per_tenant=1, num_blocks=4)
    for bad in ({"token_ids": [1] * 17}, {"token_ids": []}, {"token_ids": [1], "priority": 9}):
        with pytest.raises(GuardEngineError):
            engine.open(**bad, tenant="a")
    engine.open(token_ids=[1], tenant="a").close()
    engine.open(token_ids=[1], tenant="a")
    engine.check_integrity()


# -- pending tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["max_pending_tokens", "max_pending_tokens_per_tenant"])
def test_pending_tokens_are_limited_until_they_are_computed(make, option: str) -> None:
    engine = make(**{option: 10})
    stream = engine.open(token_ids=ids(6), tenant="a")
    stream.append([1, 2, 3, 4])
    for call in (
        lambda: stream.append([5]),
        lambda: engine.open(token_ids=[1], tenant="a"),
        lambda: stream.fork(),
    ):
        with pytest.raises(Overloaded, match=f"10 tokens are pending.*{option}=10"):
            call()
    assert (stream.token_ids, stream.num_pending_tokens) == ([*ids(6), 1, 2, 3, 4], 10)
    engine.check_integrity()
    engine.run()
    stream.append([5])
    assert stream.fork().num_pending_tokens == 1
    engine.check_integrity()


def test_tokens_pending_of_one_tenant_leave_room_for_others(make) -> None:
    engine = make(max_pending_tokens=15, max_pending_tokens_per_tenant=10)
    engine.open(token_ids=ids(10), tenant="a")
    with pytest.raises(Overloaded, match="max_pending_tokens_per_tenant"):
        engine.open(token_ids=[1], tenant="a")
    stream = engine.open(token_ids=ids(5, 1), tenant="b")
    with pytest.raises(Overloaded, match=r"in all .*max_pending_tokens=15"):
        engine.open(token_ids=[1], tenant="b")
    stream.rollback(2)
    engine.open(token_ids=[1, 2], tenant="b")
    stream.close()
    engine.open(token_ids=[1, 2, 3], tenant="c")
    engine.check_integrity()


@pytest.mark.parametrize("option", ["max_pending_tokens", "max_pending_tokens_per_tenant"])
def test_more_tokens_at_once_than_may_ever_wait_are_not_to_be_tried_again(make, option: str) -> None:
    engine = make(**{option: 4})
    with pytest.raises(StreamTooLong, match=f"5 tokens at once exceed {option}=4"):
        engine.open(token_ids=ids(5))
    stream = engine.open(token_ids=ids(4))
    engine.run()
    with pytest.raises(StreamTooLong, match=option):
        stream.append(ids(5))
    assert engine.stats()["refused"] == 2
    stream.append(ids(4))
    engine.check_integrity()


def test_check_integrity_finds_wrong_counts() -> None:
    admission = Admission(EngineConfig())
    a, b = state_of(3, "a"), state_of(4, "b")
    for state in (a, b):
        admission.enter(state)
    admission.check_integrity([a, b])
    a.token_ids.append(1)
    with pytest.raises(IntegrityError, match="in fact"):
        admission.check_integrity([a, b])
    admission.update(a)
    admission._tenants[""].num_streams += 1
    with pytest.raises(IntegrityError, match="do not add up"):
        admission.check_integrity([a, b])


# -- idle time -------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_streams_that_nobody_comes_back_to_are_closed(make, clock: Clock) -> None:
    engine = make(idle_ttl_s=10, clock=clock)
    left, used, busy = (engine.open(token_ids=ids(5, seed)) for seed in range(3))
    engine.run()
    busy.append([1])
    clock.now += 6
    used.append([1])
    engine.run()
    busy.append([2])
    clock.now += 4
    assert engine.stats()["streams_open"] == 3  # not longer than idle_ttl_s
    clock.now += 1
    assert engine.stats()["streams_open"] == 2
    assert left.is_closed
    assert left.prompt_label is not None  # what it had can be read still
    with pytest.raises(StreamClosed, match="idle_ttl_s"):
        left.append([1])
    clock.now += 10**6
    assert [label.stream_id for label in engine.step()] == [busy.stream_id]  # pending ones are not idle
    assert used.is_closed
    assert not busy.is_closed
    assert engine.stats()["expired"] == 2
    engine.check_integrity()


def test_expired_streams_make_place_for_new_ones(make, clock: Clock) -> None:
    engine = make(idle_ttl_s=10, clock=clock, max_num_streams=1)
    engine.open(token_ids=[1])
    engine.run()
    clock.now += 11
    engine.open(token_ids=[2])
    assert engine.stats()["expired"] == 1


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_stream_that_expires_takes_no_others_label_along(make, clock: Clock, max_in_flight: int) -> None:
    engine = make(idle_ttl_s=10, clock=clock, max_in_flight=max_in_flight, max_num_batched_tokens=2)
    left = engine.open(token_ids=[3])
    engine.run()
    stream = engine.open(token_ids=ids(12), role="assistant")
    labels = engine.step()  # the next two steps are in flight, where there are several
    clock.now += 11
    labels += engine.step()
    assert left.is_closed
    labels += engine.run()
    assert [label.position for label in labels] == list(range(12))
    assert labels == stream.labels
    engine.check_integrity()


# -- bad values --------------------------------------------------------------------------------------------------

NOT_NUMBERS: list[Any] = ["1", None, True, float("nan"), float("inf"), -1, [], np.float32(1)]


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("kv_reserve", [*NOT_NUMBERS, 1, 1.5, -0.1]),
        ("max_step_ms", [x for x in NOT_NUMBERS if x is not None] + [0, 1e6]),
        ("idle_ttl_s", [x for x in NOT_NUMBERS if x is not None] + [0, 1e9]),
        ("prefix_caching", [1, 0, None, "yes"]),
        ("max_pending_tokens", [0, -1, 1.5, True, "1", 2**41]),
        ("max_streams_per_tenant", [0, -1, 1.5, True, "1", 2**21]),
        ("max_pending_tokens_per_tenant", [0, -1, 1.5, True, "1", 2**41]),
    ],
)
def test_bad_options_are_named(option: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=option):
            EngineConfig.from_options({option: value})


def test_good_options_are_taken() -> None:
    EngineConfig.from_options(
        {
            "kv_reserve": 0,
            "max_step_ms": 0.5,
            "idle_ttl_s": 1,
            "prefix_caching": False,
            "max_pending_tokens": 1,
        }
    )
    EngineConfig.from_options({"kv_reserve": 0.999, "max_step_ms": None, "max_streams_per_tenant": None})


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("tenant", [None, 1, b"a", ["a"], True]),
        ("cache_salt", [0, 1, False, b"", b"a", [], ["a"]]),
        ("priority", [None, 4, -4, 1.0, True, "1", np.int64(1)]),
        ("timeout_s", [0, -1, float("nan"), float("inf"), "1", True, [], 1e9]),
        ("stream_id", ["", 1, b"a"]),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(engine: Engine, argument: str, values: list[Any]) -> None:
    before = engine.stats()
    for value in values:
        with pytest.raises(ConfigError, match=argument):
            engine.open(token_ids=[1], **{argument: value})
    assert {k: v for k, v in engine.stats().items() if k != "steps"} == {
        k: v for k, v in before.items() if k != "steps"
    }


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), "1", True, []])
def test_a_bad_timeout_of_an_append_changes_nothing(engine: Engine, timeout_s: Any) -> None:
    with engine.open(token_ids=[1, 2]) as stream:
        with pytest.raises(ConfigError, match="timeout_s"):
            stream.append([3], timeout_s=timeout_s)
        assert stream.token_ids == [1, 2]


@pytest.fixture(autouse=True)
def whole(engine: Engine) -> Iterator[None]:
    yield
    engine.check_integrity()
