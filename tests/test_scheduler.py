"""Who runs in a step: token budget, order, fairness."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardengine import IntegrityError, Policy
from guardengine.scheduler import LONG_WAIT, Scheduler
from guardengine.state import StreamState


def queued(scheduler: Scheduler, **pending: int) -> dict[str, StreamState]:
    states = {}
    for name, num_tokens in pending.items():
        states[name] = StreamState(name, Policy.strict(), [])
        states[name].token_ids.extend(range(num_tokens))
        scheduler.add(states[name])
    return states


def run(scheduler: Scheduler) -> list[tuple[str, int]]:
    chunks = scheduler.schedule()
    for state, _, num_tokens in chunks:
        state.advance(num_tokens, [])
    scheduler.finish(chunks)
    return [(state.stream_id, num_tokens) for state, _, num_tokens in chunks]


def test_one_step_mixes_prompts_and_single_tokens() -> None:
    scheduler = Scheduler(token_budget=10)
    queued(scheduler, a=1, b=6, c=1)
    assert run(scheduler) == [("a", 1), ("b", 6), ("c", 1)]
    assert run(scheduler) == []
    assert len(scheduler) == 0


def test_a_long_prompt_is_chunked_and_takes_turns() -> None:
    scheduler = Scheduler(token_budget=4)
    queued(scheduler, long=9, a=1, b=1)
    assert run(scheduler) == [("long", 2), ("a", 1), ("b", 1)]
    assert run(scheduler) == [("long", 4)]
    assert run(scheduler) == [("long", 3)]


def test_waiting_streams_keep_their_place() -> None:
    scheduler = Scheduler(token_budget=2)
    states = queued(scheduler, a=1, b=1, c=1)
    assert run(scheduler) == [("a", 1), ("b", 1)]
    queued(scheduler, d=1)
    scheduler.add(states["c"])
    assert run(scheduler) == [("c", 1), ("d", 1)]


def test_discarded_streams_are_not_run() -> None:
    scheduler = Scheduler(token_budget=4)
    states = queued(scheduler, a=1, b=2)
    scheduler.discard(states["a"])
    assert run(scheduler) == [("b", 2)]


def test_chunks_that_were_not_computed_come_up_again_in_their_places() -> None:
    scheduler = Scheduler(token_budget=4)
    states = queued(scheduler, a=3, b=3)
    chunks = scheduler.schedule()
    assert [state.num_scheduled_tokens for state in states.values()] == [2, 2]
    scheduler.requeue(chunks)
    assert [state.num_scheduled_tokens for state in states.values()] == [0, 0]
    scheduler.check_integrity(states.values())
    assert scheduler.schedule() == chunks


@given(
    pending=st.lists(st.integers(1, 50), min_size=1, max_size=20),
    budget=st.integers(1, 64),
)
def test_every_token_runs_once_within_budget_and_nobody_starves(pending: list[int], budget: int) -> None:
    scheduler = Scheduler(budget)
    states = queued(scheduler, **{f"s{i}": n for i, n in enumerate(pending)})
    num_done = dict.fromkeys(states, 0)
    last_served = dict.fromkeys(states, 0)
    for step in range(1, sum(pending) + 1):
        chunks = run(scheduler)
        if not chunks:
            break
        assert sum(n for _, n in chunks) <= budget
        for name, num_tokens in chunks:
            num_done[name] += num_tokens
            last_served[name] = step
        # A round serves every waiting stream, the long ones LONG_WAIT steps later than the short ones.
        waiting = [name for name, state in states.items() if state.num_pending_tokens]
        assert all(step - last_served[name] <= len(pending) + LONG_WAIT for name in waiting)
    assert list(num_done.values()) == pending


def test_check_integrity_finds_a_forgotten_stream() -> None:
    scheduler = Scheduler(token_budget=4)
    states = queued(scheduler, a=3)
    scheduler.check_integrity(states.values())
    scheduler.discard(states["a"])
    with pytest.raises(IntegrityError, match="pending"):
        scheduler.check_integrity(states.values())
