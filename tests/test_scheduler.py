"""Who runs in a step: token budget, order, fairness."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardengine import IntegrityError, Policy
from guardengine.scheduler import Scheduler
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
    for state, num_tokens in chunks:
        state.num_computed_tokens += num_tokens
    scheduler.finish(chunks)
    return [(state.stream_id, num_tokens) for state, num_tokens in chunks]


def test_one_step_mixes_prompts_and_single_tokens() -> None:
    scheduler = Scheduler(token_budget=10)
    queued(scheduler, a=1, b=6, c=1)
    assert run(scheduler) == [("a", 1), ("b", 6), ("c", 1)]
    assert run(scheduler) == []
    assert len(scheduler) == 0


def test_a_long_prompt_is_chunked_and_takes_turns() -> None:
    scheduler = Scheduler(token_budget=4)
    queued(scheduler, long=9, a=1, b=1)
    assert run(scheduler) == [("long", 4)]
    assert run(scheduler) == [("a", 1), ("b", 1), ("long", 2)]
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
    assert scheduler.num_pending_tokens == 2
    assert run(scheduler) == [("b", 2)]


def test_schedule_alone_changes_nothing() -> None:
    scheduler = Scheduler(token_budget=4)
    queued(scheduler, a=3, b=3)
    assert scheduler.schedule() == scheduler.schedule()


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
        # One round serves every waiting stream at least one token.
        waiting = [name for name, state in states.items() if state.num_pending_tokens]
        assert all(step - last_served[name] <= len(pending) for name in waiting)
    assert list(num_done.values()) == pending


def test_check_integrity_finds_a_forgotten_stream() -> None:
    scheduler = Scheduler(token_budget=4)
    states = queued(scheduler, a=3)
    scheduler.check_integrity(states.values())
    scheduler.discard(states["a"])
    with pytest.raises(IntegrityError, match="pending"):
        scheduler.check_integrity(states.values())
