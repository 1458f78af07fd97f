"""Who runs in a step: token budget, order, fairness."""

import pytest
from fakes import state_of
from hypothesis import given, settings
from hypothesis import strategies as st

from guardengine import IntegrityError
from guardengine.core.scheduler import LONG_WAIT, MAX_PRIORITY, PRIORITY_STEPS, SHORT, Chunk, Scheduler
from guardengine.core.state import StreamState

# Steps in which streams that come later may pass one that waits, as documented.
MAX_PASSED = LONG_WAIT + 2 * MAX_PRIORITY * PRIORITY_STEPS


def queued(scheduler: Scheduler, **pending: int) -> dict[str, StreamState]:
    states = {name: state_of(num_tokens, name) for name, num_tokens in pending.items()}
    for state in states.values():
        scheduler.add(state)
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


@settings(deadline=None)
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


# -- who goes first ------------------------------------------------------------------------------------------


def finish(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    for state, _, num_tokens in chunks:
        state.advance(num_tokens, [])
    scheduler.finish(chunks)


ARRIVALS = st.lists(  # for each step, who comes: (tokens, priority)
    st.lists(
        st.tuples(
            st.one_of(st.integers(1, 3), st.integers(1, 200)), st.integers(-MAX_PRIORITY, MAX_PRIORITY)
        ),
        max_size=4,
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=50)
@given(arrivals=ARRIVALS, budget=st.integers(1, 64), limit=st.one_of(st.none(), st.integers(1, 20)))
def test_whatever_comes_later_passes_a_waiting_stream_for_so_many_steps_only(
    arrivals: list[list[tuple[int, int]]], budget: int, limit: int | None
) -> None:
    scheduler = Scheduler(budget)
    waiting: dict[str, tuple[StreamState, int]] = {}  # and since which step
    left = sum(num_tokens for coming in arrivals for num_tokens, _ in coming)
    step = 0
    while left:
        for number, (num_tokens, priority) in enumerate(arrivals[step] if step < len(arrivals) else []):
            state = state_of(num_tokens, f"{step}-{number}", priority)
            scheduler.add(state)
            waiting[state.stream_id] = (state, step)
        chunks = scheduler.schedule(limit)
        assert sum(chunk.num_tokens for chunk in chunks) <= min(budget, limit or budget)
        assert bool(chunks) == bool(waiting)
        assert all(chunk.num_tokens > 0 for chunk in chunks)
        served = {chunk.state.stream_id for chunk in chunks}
        newest = max((waiting[name][1] for name in served), default=0)
        for name, (_, since) in waiting.items():
            assert name in served or newest <= since + MAX_PASSED
        finish(scheduler, chunks)
        left -= sum(chunk.num_tokens for chunk in chunks)
        for name in served:
            state, _ = waiting.pop(name)
            if state.num_pending_tokens:
                waiting[name] = (state, step + 1)
        scheduler.check_integrity(state for state, _ in waiting.values())
        step += 1
    assert len(scheduler) == 0


def test_a_flood_of_urgent_replies_holds_a_patient_prompt_up_no_longer_than_documented() -> None:
    scheduler = Scheduler(token_budget=8)
    patient = state_of(500, "patient", -MAX_PRIORITY)
    scheduler.add(patient)
    waits, since = [], 0
    for step in range(2000):
        for number in range(8):
            scheduler.add(state_of(1, f"{step}-{number}", MAX_PRIORITY))
        chunks = scheduler.schedule()
        finish(scheduler, chunks)
        if any(chunk.state is patient for chunk in chunks):
            waits.append(step - since)
            since = step
    # What it takes of the budget leaves as many of the flood behind, which then go before it.
    assert waits[0] == MAX_PASSED
    assert len(waits) >= 15
    for number, wait in enumerate(waits):
        assert wait <= MAX_PASSED + 1 + number * 4 / 8


@pytest.mark.parametrize("num_prompts", [1, 2, 5])
def test_short_appends_go_before_long_prompts(num_prompts: int) -> None:
    """Replies are in the very step after their append, whatever waits: the prompts' rest comes later."""
    scheduler = Scheduler(token_budget=64)
    prompts = [state_of(3000, f"prompt-{number}") for number in range(num_prompts)]
    for prompt in prompts:
        scheduler.add(prompt)
    late = 0
    for step in range(60):
        replies = [state_of(1 + (step + number) % 4, f"reply-{step}-{number}") for number in range(8)]
        for reply in replies:
            scheduler.add(reply)
        chunks = scheduler.schedule()
        finish(scheduler, chunks)
        late += sum(bool(reply.num_pending_tokens) for reply in replies)
        assert sum(chunk.num_tokens for chunk in chunks) == 64  # nothing is wasted on it
    assert late <= (0 if num_prompts == 1 else 60 * 8 // LONG_WAIT)
    assert all(prompt.num_computed_tokens for prompt in prompts)


@pytest.mark.parametrize(("num_tokens", "first"), [(SHORT, "old"), (SHORT + 1, "new")])
def test_up_to_16_tokens_are_short(num_tokens: int, first: str) -> None:
    scheduler = Scheduler(token_budget=1)
    queued(scheduler, old=num_tokens)
    queued(scheduler, new=1)
    assert run(scheduler)[0][0] == first


def test_a_long_prompt_waits_eight_steps_for_short_ones() -> None:
    scheduler = Scheduler(token_budget=1)
    queued(scheduler, long=100)
    order = []
    for step in range(LONG_WAIT + 1):
        queued(scheduler, **{f"s{step}": 1})
        order += run(scheduler)
    assert [name for name, _ in order] == [*(f"s{step}" for step in range(LONG_WAIT)), "long"]


def test_higher_priorities_go_first_and_a_step_is_worth_a_sixteenth_of_one() -> None:
    scheduler = Scheduler(token_budget=1)
    for priority in (-1, 0, 3, 1, 0):
        scheduler.add(state_of(1, f"p{priority}-{len(scheduler)}", priority))
    assert [run(scheduler)[0][0] for _ in range(5)] == ["p3-2", "p1-3", "p0-1", "p0-4", "p-1-0"]
    scheduler.add(state_of(1, "early", 0))
    for step in range(PRIORITY_STEPS + 2):
        scheduler.add(state_of(1, f"urgent-{step}", 1))
        [(name, _)] = run(scheduler)
        if name == "early":
            break
    assert step == PRIORITY_STEPS


@pytest.mark.parametrize(("budget", "shares"), [(8, [4, 4]), (9, [5, 4]), (1, [1])])
def test_a_chunk_takes_half_of_the_budget_while_others_wait(budget: int, shares: list[int]) -> None:
    scheduler = Scheduler(budget)
    queued(scheduler, a=100, b=100)
    assert [num_tokens for _, num_tokens in run(scheduler)] == shares


def test_a_budget_given_for_a_step_only_lowers_it() -> None:
    scheduler = Scheduler(token_budget=10)
    [state] = queued(scheduler, a=100).values()
    assert [chunk.num_tokens for chunk in scheduler.schedule(3)] == [3]
    assert [chunk.num_tokens for chunk in scheduler.schedule(30)] == [10]
    assert state.num_scheduled_tokens == 13


# -- several steps in flight --------------------------------------------------------------------------------------


def test_the_rest_of_a_prompt_can_follow_while_its_beginning_is_in_flight() -> None:
    scheduler = Scheduler(token_budget=4)
    [state] = queued(scheduler, a=10).values()
    steps = [scheduler.schedule() for _ in range(4)]
    assert [[chunk[1:] for chunk in chunks] for chunks in steps] == [[(0, 4)], [(4, 4)], [(8, 2)], []]
    assert len(scheduler) == 1
    for chunks in steps[:3]:
        finish(scheduler, chunks)
    assert len(scheduler) == 0
    scheduler.check_integrity([state])


def test_steps_that_failed_newest_first_leave_each_stream_in_its_first_place() -> None:
    scheduler = Scheduler(token_budget=4)
    states = queued(scheduler, a=6, b=6)
    steps = [scheduler.schedule() for _ in range(2)]
    queued(scheduler, c=1)
    for chunks in reversed(steps):
        scheduler.requeue(chunks)
    assert [state.num_scheduled_tokens for state in states.values()] == [0, 0]
    assert scheduler.schedule() == steps[0]
    scheduler.check_integrity([*states.values(), *(chunk.state for chunk in scheduler.schedule())])


def test_a_stream_with_nothing_left_to_schedule_leaves_the_queue() -> None:
    scheduler = Scheduler(token_budget=4)
    states = queued(scheduler, a=3, b=3)
    states["a"].truncate(0, 4)
    scheduler.update(states["a"])
    scheduler.check_integrity(states.values())
    assert run(scheduler) == [("b", 3)]


def test_check_integrity_finds_a_forgotten_stream() -> None:
    scheduler = Scheduler(token_budget=4)
    states = queued(scheduler, a=3)
    scheduler.check_integrity(states.values())
    scheduler.discard(states["a"])
    with pytest.raises(IntegrityError, match="pending"):
        scheduler.check_integrity(states.values())
