"""Deadlines with a clock of the tests' own: what is late counts as unjudged, and is judged all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fakes import Clock, engine_over, ids, state_of

from guardengine import Engine, Policy
from guardengine.core.deadlines import Deadlines

OPEN, CLOSED = Policy.strict(on_timeout="open"), Policy.strict()
LENIENT = {"risk_thresholds": {"Unsafe": 1.0, "Controversial": 1.0}}  # no label is a hit
CALM_OPEN, CALM_CLOSED = Policy.strict(on_timeout="open", **LENIENT), Policy.strict(**LENIENT)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(engine: Engine, clock: Clock) -> Callable[..., Engine]:
    return lambda **options: engine_over(engine, clock=clock, **options)


def verdict(stream) -> tuple[str, str]:
    return (stream.verdict.action, stream.verdict.rule)


@pytest.mark.parametrize(
    ("policy", "expected"), [(CALM_CLOSED, ("block", "timeout")), (CALM_OPEN, ("allow", "timeout-open"))]
)
def test_what_is_late_is_unjudged_and_computed_all_the_same(make, clock, policy, expected) -> None:
    engine = make()
    stream = engine.open(token_ids=ids(3), policy=policy, timeout_s=2)
    stream.append([1, 2], timeout_s=5)
    other = engine.open(token_ids=ids(3), policy=policy)
    clock.now += 3
    labels = engine.step()
    assert len(labels) == 4
    assert verdict(stream) == expected
    assert verdict(other) == ("allow", "none")
    assert len(stream.labels) == 2
    name = "timeout-closed" if policy is CALM_CLOSED else "timeout-open"
    assert engine.stats()["failures"] == {name: 1}


def test_what_is_in_time_is_judged(make, clock: Clock) -> None:
    engine = make()
    stream = engine.open(token_ids=ids(3), policy=CALM_CLOSED, timeout_s=2)
    clock.now += 1.5
    engine.step()
    clock.now += 100
    engine.step()
    stream.append([1], timeout_s=0.5)
    engine.step()
    clock.now += 100
    engine.step()
    assert verdict(stream) == ("allow", "none")
    assert engine.stats()["failures"] == {}


def test_a_step_that_ends_too_late_is_too_late(make, clock: Clock) -> None:
    engine = make()
    stream = engine.open(token_ids=ids(3), policy=CALM_CLOSED, timeout_s=2)

    def slow(num_tokens: int) -> None:
        clock.now += 2

    engine.core.runner.on_wait = slow
    engine.step()
    assert verdict(stream) == ("block", "timeout")


def test_a_part_that_is_in_time_does_not_help_the_rest(make, clock: Clock) -> None:
    engine = make(max_num_batched_tokens=2)
    stream = engine.open(token_ids=ids(4), role="assistant", policy=CALM_CLOSED, timeout_s=2)
    engine.step()
    assert verdict(stream) == ("allow", "none")
    clock.now += 2
    engine.step()
    assert verdict(stream) == ("block", "timeout")
    assert len(stream.labels) == 4


def test_time_passes_while_nothing_steps_and_counts_with_the_next(make, clock: Clock) -> None:
    engine = make()
    stream = engine.open(token_ids=ids(3), policy=CALM_CLOSED, timeout_s=2)
    clock.now += 9
    assert verdict(stream) == ("allow", "none")
    engine.step()
    assert verdict(stream) == ("block", "timeout")


def test_open_clears_what_was_late(make, clock: Clock) -> None:
    engine = make()
    stream = engine.open(token_ids=[1], policy=Policy.strict(on_timeout="open", hold_back=9, **LENIENT))
    stream.append([1, 2, 3], timeout_s=1)
    clock.now += 2
    engine.step()
    assert stream.verdict.cleared == 3
    stream.append([4, 5])
    engine.step()
    assert stream.verdict.cleared == 3  # those are held back as ever


def test_what_comes_in_the_place_of_cleared_tokens_is_not_cleared(make, clock: Clock) -> None:
    engine = make(max_num_batched_tokens=1)
    stream = engine.open(token_ids=[1], policy=CALM_OPEN)
    engine.run()
    stream.append([1, 2, 3, 4], timeout_s=1)
    clock.now += 2
    engine.step()
    assert (stream.verdict.cleared, len(stream.labels)) == (4, 1)
    stream.rollback(2)
    assert stream.verdict.cleared == 2
    stream.append([7, 8, 9])
    assert stream.verdict.cleared == 2
    engine.run()
    assert stream.verdict.cleared == 5
    stream.rollback(5)
    assert stream.verdict.cleared == 0


def test_rolled_back_tokens_are_due_no_more_and_those_left_are(make, clock: Clock) -> None:
    engine = make()
    gone, left, older = (engine.open(token_ids=[1], policy=CALM_CLOSED) for _ in range(3))
    engine.run()
    for stream in (gone, left):
        stream.append([1, 2, 3], timeout_s=1)
    gone.rollback(3)
    left.rollback(2)
    older.append([1])  # not due at all
    older.append([2], timeout_s=1)
    older.rollback(1)
    clock.now += 2
    engine.run()
    assert [verdict(stream)[1] for stream in (gone, left, older)] == ["none", "timeout", "none"]


def test_a_branch_is_due_when_its_parent_is(make, clock: Clock) -> None:
    engine = make()
    parent = engine.open(token_ids=[1], policy=CALM_CLOSED, timeout_s=5)
    branch = parent.fork()
    parent.close()
    clock.now += 6
    engine.run()
    assert verdict(branch) == ("block", "timeout")
    assert engine.stats()["failures"] == {"timeout-closed": 1}


def test_a_branch_of_a_computed_stream_has_no_deadline(make, clock: Clock) -> None:
    engine = make()
    parent = engine.open(token_ids=[1], policy=CALM_CLOSED, timeout_s=5)
    engine.run()
    branch = parent.fork()
    clock.now += 6
    branch.append([1])
    engine.run()
    assert verdict(branch) == ("allow", "none")


def test_a_closed_stream_misses_nothing(make, clock: Clock) -> None:
    engine = make()
    engine.open(token_ids=ids(3), timeout_s=2, stream_id="a").close()
    namesake = engine.open(token_ids=ids(3), stream_id="a", policy=CALM_CLOSED)
    clock.now += 3
    engine.step()
    assert verdict(namesake) == ("allow", "none")


def test_a_refused_append_leaves_no_deadline(make, clock: Clock) -> None:
    engine = make(max_pending_tokens=2)
    stream = engine.open(token_ids=[1], policy=CALM_CLOSED)
    for tokens in ([1] * 2, [1] * 3, [1] * 1000):
        with pytest.raises(Exception, match="tokens"):
            stream.append(tokens, timeout_s=1)
    clock.now += 2
    engine.run()
    assert verdict(stream) == ("allow", "none")


def test_what_was_found_in_the_cache_can_be_late_too(make, clock: Clock) -> None:
    engine = make()
    for late in (False, True):
        stream = engine.open(token_ids=ids(8), policy=CALM_CLOSED, timeout_s=1)
        clock.now += 2 * late
        engine.step()
        assert verdict(stream)[1] == ("timeout" if late else "none")


def test_failed_steps_do_not_stop_the_clock(make, clock: Clock) -> None:
    engine = make()
    stream = engine.open(token_ids=ids(3), policy=CALM_CLOSED, timeout_s=2)
    engine.core.runner.faults.plant("launch", RuntimeError("kernel"))
    with pytest.raises(RuntimeError):
        engine.step()
    clock.now += 3
    assert len(engine.step()) == 1
    assert verdict(stream) == ("block", "timeout")


def test_missed_in_order_of_time() -> None:
    deadlines, streams = Deadlines(), [state_of(4, f"s{i}") for i in range(4)]
    for stream, time in zip(streams, (3.0, 1.0, 2.0, 9.0), strict=True):
        deadlines.add(stream, 0, 4, time)
    streams[2].advance(4, [])
    assert [deadlines.pop_missed(5.0) for _ in range(3)] == [streams[1], streams[0], None]
    assert deadlines.pop_missed(9.0) is streams[3]


def test_deadlines_that_were_met_are_not_kept() -> None:
    deadlines = Deadlines()
    pending = [state_of(1, f"p{i}") for i in range(100)]
    for stream in pending:
        deadlines.add(stream, 0, 1, 1e6)
    for index in range(5000):
        stream = state_of(4, f"s{index}")
        deadlines.add(stream, 0, 4, 1e9 - index)
        stream.advance(4, [])
    assert len(deadlines) <= 400
    assert [deadlines.pop_missed(1e9) for _ in range(101)] == [*pending, None]
