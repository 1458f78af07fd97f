"""One thread, one call at a time: who comes from elsewhere, or from inside a call, is told so."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guardengine import AutoGuard, Engine, WrongThread
from guardengine.core.gate import Gate

SMALL: dict[str, Any] = {"kv_cache_bytes": 2**20, "block_size": 4, "max_model_len": 128}


def in_thread(call: Callable[[], Any]) -> Any:
    """What a call returns or raises in another thread."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def enter(gate: Gate) -> str:
    with gate:
        return "in"


def test_the_first_thread_owns_it() -> None:
    gate = Gate()
    assert in_thread(lambda: enter(gate)) == "in"
    with pytest.raises(WrongThread, match="another one"):
        enter(gate)


def test_a_call_inside_a_call_is_refused_and_the_outer_one_goes_on() -> None:
    gate = Gate()
    with gate:
        with pytest.raises(WrongThread, match="middle of another call"), gate:
            pass
        assert isinstance(in_thread(lambda: enter(gate)), WrongThread)
    assert enter(gate) == "in"


def test_errors_leave_it_open() -> None:
    gate = Gate()
    with pytest.raises(ZeroDivisionError), gate:
        _ = 1 / 0
    assert enter(gate) == "in"


def test_it_can_be_handed_over() -> None:
    gate = Gate()
    enter(gate)
    gate.hand_over()
    assert in_thread(lambda: enter(gate)) == "in"
    with pytest.raises(WrongThread):
        gate.hand_over()
    with pytest.raises(WrongThread):
        enter(gate)


# -- engines -------------------------------------------------------------------------------------------------


def test_an_engine_may_be_loaded_in_one_thread_and_used_in_another(tiny: Path) -> None:
    engine = Engine.from_pretrained(tiny, **SMALL)
    stream = in_thread(lambda: engine.open(token_ids=[1, 2]))
    assert stream.token_ids == [1, 2]
    with pytest.raises(WrongThread):
        engine.step()
    guard = in_thread(lambda: AutoGuard.from_pretrained(tiny, **SMALL))
    result, state = guard.stream_moderate_from_ids([1, 2], role="user")
    assert len(result["risk_level"]) == 2
    guard.close_stream(state)


def test_every_call_from_another_thread_is_refused_and_changes_nothing(tiny: Path) -> None:
    engine = Engine.from_pretrained(tiny, **SMALL)
    stream = engine.open(token_ids=[1, 2])
    before = engine.stats()
    for call in (
        lambda: engine.open(token_ids=[1]),
        engine.step,
        engine.run,
        engine.stats,
        engine.check_integrity,
        engine.close,
        lambda: engine.moderate_many([]),
        lambda: stream.append([3]),
        stream.fork,
        lambda: stream.rollback(1),
        stream.close,
    ):
        assert isinstance(in_thread(call), WrongThread)
    assert engine.stats() == before
    # What is only read may be read from anywhere.
    assert in_thread(lambda: (stream.token_ids, stream.labels, stream.is_closed)) == ([1, 2], [], False)
    assert in_thread(lambda: stream.verdict) == stream.verdict
    engine.close()


def test_a_call_from_inside_a_step_is_refused(tiny: Path) -> None:
    engine = Engine.from_pretrained(tiny, **SMALL)
    stream = engine.open(token_ids=[1, 2])
    launch, errors = engine.core.runner.launch, []

    def launch_and_call(batch: Any) -> Any:
        for call in (lambda: stream.append([3]), engine.step, stream.close):
            try:
                call()
            except WrongThread as error:
                errors.append(error)
        return launch(batch)

    engine.core.runner.launch = launch_and_call  # type: ignore[method-assign]
    assert [label.position for label in engine.step()] == [1]
    assert len(errors) == 3
    engine.check_integrity()
    engine.close()


def test_states_that_the_garbage_collector_finds_in_another_thread_are_closed_by_the_owner(
    tiny: Path,
) -> None:
    guard = AutoGuard.from_pretrained(tiny, **SMALL)
    states = [guard.stream_moderate_from_ids([1, 2, i], role="user")[1] for i in range(3)]

    def collect() -> None:
        states.clear()
        gc.collect()

    in_thread(collect)
    assert len(guard.core.states) == 3
    guard.core.sweep()
    assert len(guard.core.states) == 0
    guard.core.check_integrity()
