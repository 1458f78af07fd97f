"""Snapshots: a restored stream is the stream it was; nothing comes twice; damaged or hostile ones are refused."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from guardengine import (
    CheckpointError,
    ConfigError,
    Engine,
    GuardEngineError,
    Label,
    Overloaded,
    Policy,
    Stream,
    StreamClosed,
    StreamTooLong,
)

SMALL: dict[str, Any] = {"kv_cache_bytes": 2**22, "max_model_len": 256, "block_size": 4, "backend": "cpu"}
POLICY = Policy.strict(
    debounce=2,
    hold_back=1,
    risk_thresholds={"Controversial": 0.4},
    category_thresholds={"Violent": 0.6},
    ignored_categories=["PII"],
    actions={"Controversial": "flag"},
    on_timeout="open",
)
PROMPT, REPLY = [7, 8, 9, 10, 11, 12], [21, 22, 23, 24, 25, 26, 27, 28, 29]


def values(label: Label | None) -> Any:
    """Everything in a label, exactly."""
    if label is None:
        return None
    parts = [getattr(label, name) for name in Label.__slots__]
    return [part.tobytes() if hasattr(part, "tobytes") else part for part in parts]


def books(stream: Stream) -> Any:
    return (
        [values(label) for label in stream.labels],
        values(stream.prompt_label),
        stream.verdict,
        stream.token_ids,
        *(stream._state.wanted, stream._state.turns),
    )


def through_json(stream: Stream) -> dict[str, Any]:
    return json.loads(json.dumps(stream.snapshot(), allow_nan=False))  # type: ignore[no-any-return]


@pytest.fixture
def other(tiny: Path) -> Iterator[Engine]:
    """Another engine with the same weights, in place of another process."""
    with Engine.from_pretrained(tiny, **SMALL) as engine:
        yield engine
        engine.check_integrity()


@pytest.fixture(scope="module")
def texts(checkpoints: Callable[..., Path]) -> Path:
    return checkpoints("stream-tiny", dtype="float32")


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_a_restored_stream_is_the_undisturbed_one(engine: Engine, other: Engine, num_steps: int) -> None:
    stream = engine.open(token_ids=PROMPT, policy=POLICY, stream_id="a", tenant="t", priority=2)
    returned: list[Label] = []
    for token_id in REPLY[:num_steps]:
        returned += engine.step()
        stream.append([token_id])
    restored = other.restore(through_json(stream))
    assert books(restored) == books(stream)
    for name in ("tenant", "priority", "salt"):
        assert getattr(restored._state, name) == getattr(stream._state, name)
    for one, runner in ((stream, engine), (restored, other)):
        later = runner.run()
        one.append(REPLY[num_steps:])
        later += runner.run()
        assert [label.position for label in (*returned, *later)] == list(range(5, 15))
    assert books(restored) == books(stream)
    assert restored._state.policy_states == stream._state.policy_states


@pytest.mark.slow
def test_turns_go_on_where_messages_left_off(texts: Path) -> None:
    with Engine.from_pretrained(texts, **SMALL) as engine, Engine.from_pretrained(texts, **SMALL) as other:
        stream = engine.open(messages=[{"role": "user", "content": "Hello"}])
        stream.append([9707, 11])
        engine.run()
        good = through_json(stream)
        (_, _, end, _), reply = good["turns"]
        for bad in ([], [reply], [["user", 0, end - 1, True], reply], [["user", 0, end, False], reply]):
            with pytest.raises(ConfigError, match="turns"):
                other.restore({**good, "turns": bad})
        restored = other.restore(good)
        for one, runner in ((stream, engine), (restored, other)):
            one.append([1879, 151645])
            one.append([3838, 30], role="user")
            one.append([40, 1513])
            runner.run()
            one.rollback(1)
        assert books(restored) == books(stream)
        with pytest.raises(GuardEngineError, match="broken turn"):
            restored.rollback(3)


_KILLED = """
import json, os, signal, sys
from guardengine import Engine, Policy
folder, out, prompt, reply, limits = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
engine = Engine.from_pretrained(folder, **limits)
stream = engine.open(token_ids=prompt, policy=Policy.strict(debounce=3), stream_id="a")
returned = []
for token_id in reply[:5]:
    returned += [label.position for label in engine.step()]
    stream.append([token_id])
    with open(out, "w") as file:
        json.dump([stream.snapshot(), returned], file)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_in_the_next(tiny: Path, other: Engine, tmp_path: Path) -> None:
    out = tmp_path / "snapshot.json"
    arguments = [str(tiny), str(out), *(json.dumps(value) for value in (PROMPT, REPLY, SMALL))]
    run = subprocess.run([sys.executable, "-P", "-c", _KILLED, *arguments], check=False, timeout=300)
    assert run.returncode == -signal.SIGKILL
    snapshot, returned = json.loads(out.read_text())
    restored = other.restore(snapshot)
    undisturbed = other.open(token_ids=PROMPT, policy=Policy.strict(debounce=3))
    for stream in (restored, undisturbed):
        stream.append(REPLY[len(stream.token_ids) - len(PROMPT) :])
    later = [label.position for label in other.run() if label.stream_id == "a"]
    assert returned + later == list(range(5, 15))
    for one, same in zip(restored.labels, undisturbed.labels, strict=True):
        assert values(one)[1:] == values(same)[1:]  # all but the stream's name
    assert values(restored.prompt_label)[1:] == values(undisturbed.prompt_label)[1:]
    assert restored.verdict == undisturbed.verdict


def test_nothing_runs_before_the_next_append(engine: Engine, other: Engine) -> None:
    stream = engine.open(token_ids=PROMPT + REPLY)
    engine.run()
    restored = other.restore(through_json(stream))
    assert other.run() == []
    stats = other.stats()
    assert (stats["steps"], stats["tokens_computed"], stats["streams_idle"]) == (0, 0, 1)
    restored.append([1])
    assert [label.position for label in other.run()] == [len(PROMPT + REPLY)]


def test_the_prefix_cache_helps_where_the_salt_is_the_same(engine: Engine, other: Engine) -> None:
    stream = engine.open(token_ids=PROMPT + REPLY, tenant="t")
    engine.run()
    snapshot = through_json(stream)
    for tenant, num_hits in (("someone else", 0), ("t", 12)):
        other.open(token_ids=PROMPT + REPLY, tenant=tenant)
        other.run()
        before = other.stats()["prefix_tokens_hit"]
        restored = other.restore(snapshot, stream_id=f"restored beside {tenant}")
        restored.append([1])
        assert other.stats()["prefix_tokens_hit"] - before == num_hits
        restored.close()


def test_labels_that_no_step_returned_come_once(engine: Engine, other: Engine) -> None:
    stream = engine.open(token_ids=PROMPT, stream_id="a")
    engine.step()
    stream.append(REPLY[:3])
    engine.core.run_until_computed([engine.open(token_ids=[1, 2])._state])  # as `moderate` does
    snapshot = through_json(stream)
    assert snapshot["num_undelivered"] == 3
    for name in (None, "b"):
        restored = other.restore(snapshot, stream_id=name)
        labels = other.run()
        assert [(label.stream_id, label.position) for label in labels] == [
            (name or "a", p) for p in (6, 7, 8)
        ]
        assert [values(label) for label in labels] == [values(label) for label in restored.labels]
        assert other.run() == []


def test_failures_count_and_can_be_rolled_back(engine: Engine, other: Engine) -> None:
    stream = engine.open(
        token_ids=PROMPT, policy=Policy.loose(on_timeout="open", on_error="closed", debounce=50)
    )
    engine.core.fail(stream._state, "timeout")
    engine.step()
    stream.append(REPLY[:3])
    engine.run()
    engine.core.fail(stream._state, "timeout")
    stream.append(REPLY[3:5])
    engine.core.fail(stream._state, "error")
    engine.run()
    branch = stream.fork()
    restored = other.restore(through_json(branch))
    assert restored._state.policy_states == stream._state.policy_states
    for count in (1, 1, 2, 5):
        for one in (stream, restored):
            one.rollback(count)
        assert restored.verdict == stream.verdict
        again = other.restore(through_json(stream), stream_id=f"again-{stream._state.num_tokens}")
        assert again._state.policy_states == stream._state.policy_states


def test_a_branch_keeps_the_ids_that_its_labels_came_with(engine: Engine, other: Engine) -> None:
    stream = engine.open(token_ids=PROMPT, stream_id="parent")
    stream.append(REPLY[:2])
    engine.run()
    branch = stream.fork("branch")
    branch.append([1])
    engine.run()
    restored = other.restore(through_json(branch), stream_id="new")
    assert [label.stream_id for label in restored.labels] == ["parent", "parent", "branch"]
    assert books(restored) == books(branch)


# -- what is refused -------------------------------------------------------------------------------------------


def test_other_weights_and_other_arithmetic_are_refused(
    checkpoints: Callable[..., Path], tiny: Path, engine: Engine
) -> None:
    stream = engine.open(token_ids=PROMPT)
    engine.run()
    snapshot = through_json(stream)
    with Engine.from_pretrained(checkpoints(vocab_size=512, dtype="float32", seed=1), **SMALL) as other:
        with pytest.raises(CheckpointError, match=r"weights.*token_ids"):
            other.restore(snapshot)
        assert other.stats()["streams_open"] == 0
    for option in ({"dtype": "bfloat16"}, {"quantization": "int8"}, {"kv_dtype": "int8"}):
        with (
            Engine.from_pretrained(tiny, **SMALL, **option) as other,
            pytest.raises(ConfigError, match=f"numerics.*{next(iter(option))}"),
        ):
            other.restore(snapshot)


def test_limits_hold_for_restored_streams(tiny: Path, engine: Engine) -> None:
    stream = engine.open(token_ids=PROMPT + REPLY, tenant="t", stream_id="a")
    pending = through_json(stream)
    engine.run()
    with Engine.from_pretrained(tiny, **{**SMALL, "max_model_len": 8}) as other, pytest.raises(StreamTooLong):
        other.restore(through_json(stream))
    with Engine.from_pretrained(tiny, **SMALL, max_streams_per_tenant=1, max_pending_tokens=20) as other:
        with other.open(token_ids=[1] * 10), pytest.raises(Overloaded, match="pending"):
            other.restore(pending)
        other.restore(through_json(stream))
        with pytest.raises(ConfigError, match="in use"):
            other.restore(through_json(stream))
        with pytest.raises(Overloaded, match="tenant"):
            other.restore(through_json(stream), stream_id="b")
        other.check_integrity()
    with pytest.raises(StreamClosed):
        other.restore(pending)
    stream.close()
    with pytest.raises(StreamClosed):
        stream.snapshot()


def test_each_damage_is_named(engine: Engine, other: Engine) -> None:
    stream = engine.open(token_ids=PROMPT, policy=POLICY)
    stream.append(REPLY[:2])
    engine.run()
    stream.append(REPLY[2:4])
    good = through_json(stream)
    other.restore(good).close()
    hexes = good["labels"][0][2]
    policy = good["policy"]
    # fmt: off
    damages: list[tuple[str, Any]] = [
        ("format", "x"), ("version", 2), ("version", True), ("guardengine", 1), ("weights", None), ("numerics", {}),
        ("stream_id", ""), ("stream_id", 5), ("tenant", 5), ("salt", "xx"), ("salt", "abc"), ("priority", 9),
        ("policy", {}), ("policy", {**policy, "debounce": 0}), ("policy", {**policy, "rule": []}),
        ("risk_thresholds", None), ("token_ids", [512]), ("token_ids", "abc"), ("token_ids", [[1]]), ("turns", []),
        ("turns", [[1, 2]]), ("num_seen_tokens", 99), ("num_seen_tokens", -1), ("num_undelivered", 4),
        ("wanted", [["assistant", 3, 4]]), ("wanted", [["robot", 8, 9]]), ("wanted", [["user", 8, 11]]),
        ("labels", [[5, "user", hexes[:-8]]]), ("labels", [[5, "user", hexes.upper()]]),
        ("labels", [[5, "user", hexes], [5, "user", hexes]]), ("labels", [[9, "user", hexes]]),
        ("failures", [[3, "timeout", 0]]), ("failures", [[5, "boredom", 0]]),
        ("failures", [[6, "error", 0], [5, "error", 0]]),
    ]
    # fmt: on
    for key, value in damages:
        bad = {**good, key: value}
        if key == "risk_thresholds":
            bad = {**good, "policy": {**policy, key: {"Nonsense": 0.5}}}
        with pytest.raises((ConfigError, CheckpointError), match=key) as refused:
            other.restore(bad)
        assert len(str(refused.value)) < 700
    for bad in (
        None,
        [],
        "x",
        {},
        {**good, "more": 1},
        {**good, 1: 2},
        {**good, "salt": float("nan")},
        object(),
    ):
        with pytest.raises(ConfigError, match="snapshot"):
            other.restore(bad)  # type: ignore[arg-type]
    loop: list[Any] = []
    loop.append(loop)
    deep: Any = reduce(lambda inner, _: [inner], range(50_000), 0)
    for bad in (loop, deep, 10**6000, float("inf"), b"x", {1, 2}):
        for key in ("labels", "policy", "token_ids"):
            with pytest.raises(ConfigError):
                other.restore({**good, key: bad})
    assert other.stats()["streams_open"] == 0


@pytest.mark.slow
def test_hostile_snapshots_never_crash(texts: Path) -> None:
    """Random damage is refused by name, or gives a stream that works."""
    rng = random.Random(0)
    junk = [
        None,
        True,
        -1,
        0,
        1,
        3,
        7,
        2**31,
        2**70,
        1.5,
        "",
        "user",
        "assistant",
        "x" * 50,
        [],
        {},
        [[]],
        [-1, 2],
    ]

    def damage(value: Any) -> Any:
        if isinstance(value, dict) and value and rng.random() < 0.9:
            key = rng.choice(list(value))
            return {**value, key: damage(value[key])}
        if isinstance(value, list) and value and rng.random() < 0.9:
            index = rng.randrange(len(value))
            kind = rng.random()
            if kind < 0.15:
                return value[:index] + value[index + 1 :]
            if kind < 0.3:
                return [*value[:index], value[index], *value[index:]]
            return [*value[:index], damage(value[index]), *value[index + 1 :]]
        return value + rng.randint(-3, 3) if type(value) is int and rng.random() < 0.5 else rng.choice(junk)

    with Engine.from_pretrained(texts, **SMALL) as engine:
        stream = engine.open(messages=[{"role": "user", "content": "Hi"}], policy=POLICY)
        stream.append([9707, 11, 151645])
        stream.append([3838], role="user")
        stream.append([40, 1513])
        engine.run()
        engine.core.fail(stream._state, "timeout")
        stream.append([41])
        good = through_json(stream)
        stream.close()
        num_restored = 0
        for round_ in range(1500):
            bad = damage(good)
            try:
                restored = engine.restore(bad, stream_id=f"s{round_}")
            except (ConfigError, CheckpointError, StreamTooLong):
                continue
            num_restored += 1
            for action in (
                lambda s: s.append([40]),
                lambda s: s.append([40], role="user"),
                lambda s: s.rollback(1),
                lambda s: engine.run(),
                lambda s: s.rollback(5),
                lambda s: s.fork().close(),
            ):
                with contextlib.suppress(GuardEngineError):
                    action(restored)
            engine.run()
            assert restored.verdict.action in ("allow", "flag", "block")
            engine.check_integrity()
            restored.close()
        assert 20 < num_restored < 1000
        assert engine.stats()["streams_open"] == 0
