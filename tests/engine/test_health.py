"""Health asks the model; streams that fail are parked and found by halves."""

from __future__ import annotations

import numpy as np
import pytest
from launching import BLOCK_BYTES, POISON, Launches, is_poisoned, same, sync_engine

from guardengine import ConfigError, Engine, IntegrityError, StreamClosed
from guardengine.core.isolation import step_apart
from guardengine.core.scheduler import Scheduler
from guardengine.core.state import StreamState
from guardengine.runners.runner import Computed, Scores


def test_a_canary_disturbs_nobody(tiny) -> None:
    with sync_engine(tiny) as engine, sync_engine(tiny) as calm:
        streams = [each.open(token_ids=list(range(40))) for each in (engine, calm)]
        first = engine.health()
        assert (first["status"], first["note"], first["last_step_age_s"]) == ("ok", None, None)
        assert first["canary_ms"] > 0
        for each in (engine, calm):
            each.step()
            streams[each is calm].append([3, 4])
        assert engine.health(timeout_s=20)["status"] == "ok"
        engine.check_integrity()
        engine.run()
        calm.run()
        assert same(streams[0].labels, streams[1].labels)
        assert engine.stats() == calm.stats()
        assert 0 <= engine.health()["last_step_age_s"] < 30
        for timeout_s in (0, -1, "1", True):
            with pytest.raises(ConfigError, match="timeout_s"):
                engine.health(timeout_s=timeout_s)
    with pytest.raises(StreamClosed):
        engine.health()


def test_a_canary_runs_after_the_steps_in_flight(tiny) -> None:
    with sync_engine(tiny, max_num_batched_tokens=16) as engine:
        Launches(engine, max_in_flight=2)
        stream = engine.open(token_ids=list(range(60)))
        engine.step()
        assert len(engine.core.pipeline) == 1
        assert engine.health()["status"] == "ok"
        assert len(engine.core.pipeline) == 0
        assert [label.stream_id for label in engine.run()] == [stream.stream_id]


def test_a_slow_canary_is_a_stall(tiny) -> None:
    with sync_engine(tiny) as engine:
        assert engine.health(timeout_s=1e-9)["status"] == "stalled"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("change", ["nan", "one bit"])
def test_wrong_numbers_are_found(tiny, backend: str, change: str) -> None:
    with Engine.from_pretrained(tiny, backend=backend, kv_cache_bytes=2**20, max_model_len=64) as engine:
        assert engine.health()["status"] == "ok"
        launch = engine.core.runner.launch

        def wrong(batch):
            logits = launch(batch).wait().logits.copy()
            logits[0, 3] = np.nan if change == "nan" else np.nextafter(logits[0, 3], np.float32(np.inf))
            return Computed(Scores(logits))

        engine.core.runner.launch = wrong
        health = engine.health()
        is_seen = change == "nan" or backend == "cpu"
        assert health["status"] == ("failing" if is_seen else "ok")
        assert bool(health["note"]) == is_seen
        engine.core.runner.launch = launch
        assert engine.health()["status"] == "ok"


def test_no_block_for_the_canary(tiny) -> None:
    with sync_engine(tiny, kv_cache_bytes=4 * BLOCK_BYTES, kv_reserve=0) as engine:
        launches = Launches(engine)
        stream = engine.open(token_ids=[1] * 64)
        health = engine.health()
        assert (health["status"], health["canary_ms"]) == ("ok", None)
        assert "no KV block is free" in health["note"]
        launches.fails = lambda batch: True
        with pytest.raises(RuntimeError):
            engine.step()
        health = engine.health()
        assert (health["status"], health["last_error"]) == ("failing", "RuntimeError: the model failed")
        launches.fails = lambda batch: False
        engine.step()
        assert engine.health()["status"] == "ok"
        assert stream.prompt_label is not None


@pytest.mark.parametrize("poisoned", [[0], [30], [3, 4], [0, 16, 31], list(range(32))])
def test_the_poisoned_are_found_by_halves(tiny, poisoned: list[int]) -> None:
    with sync_engine(tiny) as engine, sync_engine(tiny) as calm:
        launches = Launches(engine)
        streams = [engine.open(token_ids=[1 + i, POISON if i in poisoned else 7, 3]) for i in range(32)]
        bystander = engine.open(token_ids=[5] * 300)
        twins = [calm.open(token_ids=stream.token_ids) for stream in streams]
        calm.run()
        launches.fails = is_poisoned
        with engine.core.gate:
            labels, given_up = step_apart(engine.core, engine.canary)
        assert sorted(stream.stream_id for stream in given_up) == sorted(
            streams[i].stream_id for i in poisoned
        )
        engine.check_integrity()
        assert {label.stream_id for label in labels} >= {
            stream.stream_id for i, stream in enumerate(streams) if i not in poisoned
        }
        assert launches.num_failed <= 2 + 2 * 5 * len(poisoned)
        engine.run()
        assert bystander.prompt_label is not None
        for i, (stream, twin) in enumerate(zip(streams, twins, strict=True)):
            if i in poisoned:
                assert (stream.prompt_label, stream.verdict.rule) == (None, "error")
                assert not engine.core.has_work
                stream.append([4])  # tried again
                assert engine.core.has_work
                stream.close()
            else:
                assert same([stream.prompt_label], [twin.prompt_label])
        assert engine.stats()["failures"] == {"error-closed": len(poisoned)}
        engine.check_integrity()


def test_parked_streams_are_left_out_and_keep_their_place() -> None:
    def stream(name: str) -> StreamState:
        state = StreamState(name, policy=None, policy_states=[])  # type: ignore[arg-type]
        state.token_ids.extend(range(4))
        return state

    scheduler = Scheduler(8)
    first, second, third = streams = [stream(name) for name in "abc"]
    for each in streams:
        scheduler.add(each)
    scheduler.park(first)
    assert len(scheduler) == 2
    scheduler.check_integrity(streams)
    with scheduler.only([third]):
        chunks = scheduler.schedule()
        assert [chunk.state for chunk in chunks] == [third]
        scheduler.requeue(chunks)
        scheduler.discard(second)  # closed meanwhile
    assert len(scheduler) == 1
    with pytest.raises(IntegrityError):
        scheduler.check_integrity(streams)
    scheduler.add(first)
    scheduler.check_integrity([first, third])
    assert [chunk.state for chunk in scheduler.schedule()] == [first, third]
