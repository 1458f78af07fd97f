"""How many tokens fit into a time, learned from steps of machines that tests make up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fakes import Clock, engine_over, ids
from hypothesis import given, settings
from hypothesis import strategies as st

from guardengine import Engine
from guardengine.core.pipeline import StepTimes

MACHINES: dict[str, Callable[[int], float]] = {
    "linear": lambda n: 1e-3 * n,
    "fixed cost": lambda n: 10e-3 + 0.2e-3 * n,
    "steps": lambda n: 5e-3 * -(-n // 64),
    "superlinear": lambda n: 1e-3 + 1e-6 * n * n,
}


def settle(times: StepTimes, machine: Callable[[int], float], limit_s: float, num_steps: int) -> list[float]:
    """Steps as large as they may be; how long each took."""
    took = []
    for _ in range(num_steps):
        num_tokens = times.tokens_within(limit_s)
        took.append(machine(num_tokens))
        times.observe(num_tokens, took[-1])
    return took


def test_nothing_is_known_at_first() -> None:
    assert StepTimes().tokens_within(1e-9) == StepTimes().tokens_within(1e9) == 16


@pytest.mark.parametrize("limit_s", [5e-3, 50e-3, 0.5])
@pytest.mark.parametrize("machine", MACHINES)
def test_steps_become_as_large_as_the_limit_allows_and_hardly_ever_larger(
    machine: str, limit_s: float
) -> None:
    times = StepTimes()
    took = settle(times, MACHINES[machine], limit_s, 200)
    least = MACHINES[machine](16)
    assert sum(t > max(limit_s, least) * 1.05 for t in took) <= 8
    assert max(took) <= max(least, 4 * limit_s)
    assert max(took[-20:]) >= max(least, 0.6 * limit_s)


def test_growth_is_twofold_at_most() -> None:
    times, sizes = StepTimes(), []
    for _ in range(8):
        sizes.append(times.tokens_within(1.0))
        times.observe(sizes[-1], 1e-6)
    assert sizes == [16 * 2**i for i in range(8)]


def test_a_machine_that_becomes_slower_gets_smaller_steps() -> None:
    times = StepTimes()
    settle(times, lambda n: 1e-4 * n, 50e-3, 50)
    took = settle(times, lambda n: 1e-3 * n, 50e-3, 60)
    assert max(took[-20:]) <= 55e-3


@pytest.mark.parametrize("hiccup_at", [0, 1, 2, 3, 5, 20])
def test_one_hiccup_does_not_hold_steps_back_for_ever(hiccup_at: int) -> None:
    times, machine = StepTimes(), MACHINES["linear"]
    settle(times, machine, 50e-3, hiccup_at)
    num_tokens = times.tokens_within(50e-3)
    times.observe(num_tokens, 3.0)
    took = settle(times, machine, 50e-3, 500)
    assert max(took[-100:]) >= 40e-3
    assert sum(t > 55e-3 for t in took) <= 8


def test_a_clock_that_stands_still_is_borne() -> None:
    times = StepTimes()
    for num_tokens in (16, 32, 64):
        times.observe(num_tokens, 0.0)
    assert times.tokens_within(1e-3) == 128


@settings(deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 10)), max_size=300),
    limit_s=st.floats(1e-6, 10),
)
def test_any_history_gives_a_number_of_tokens(steps: list[tuple[int, float]], limit_s: float) -> None:
    times = StepTimes()
    for num_tokens, seconds in steps:
        times.observe(num_tokens, seconds)
        assert 16 <= times.tokens_within(limit_s) <= 2 * 4096


def test_max_step_ms_is_kept_to_by_an_engine(engine: Engine) -> None:
    """On a machine with a millisecond for a token; short of what is not known yet, 16 tokens a step are the least."""
    clock = Clock()
    limited = engine_over(engine, clock=clock, max_step_ms=40, max_num_batched_tokens=256)
    sizes = []

    def take_time(num_tokens: int) -> None:
        sizes.append(num_tokens)
        clock.now += 1e-3 * num_tokens

    limited.core.runner.on_wait = take_time
    stream = limited.open(token_ids=ids(500), role="assistant")
    limited.run()
    assert sizes[0] == 16
    assert all(size <= 40 for size in sizes)
    assert min(sizes[2:-1]) >= 38
    assert len(stream.labels) == 500
    stream.close()
    limited.check_integrity()


def test_max_step_ms_never_passes_max_num_batched_tokens(engine: Engine) -> None:
    clock = Clock()
    limited = engine_over(engine, clock=clock, max_step_ms=1e5, max_num_batched_tokens=48)
    sizes: list[int] = []
    limited.core.runner.on_wait = sizes.append
    limited.open(token_ids=ids(200))
    limited.run()
    assert sizes == [16, 32, 48, 48, 48, 8]
