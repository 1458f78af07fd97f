"""The audit log: everything said is on record, in time, once; what cannot be recorded is not handed out."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from audit_logs import SMALL, as_logged, labels_in, records

from guardengine import ConfigError, Engine, Label, Policy
from guardengine.core.recorder import Recorder


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def audited(tiny: Path, log: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(tiny, **SMALL, audit_log=log) as engine:
        yield engine
        engine.check_integrity()


# -- what is on record -----------------------------------------------------------------------------------------


def test_the_log_says_who_wrote_it(audited: Engine, log: Path) -> None:
    (start,) = records(log)
    stats = audited.stats()
    assert start["event"] == "start"
    assert start["n"] == 0
    assert (start["format"], start["version"]) == ("guardengine-audit", 1)
    assert start["weights"] == audited.weights_digest()
    assert start["guardengine"] == stats["version"]
    assert (start["backend"], start["isa"], start["block_size"]) == ("cpu", stats["isa"], 4)
    assert start["numerics"] == {"dtype": "float32", "quantization": None, "kv_dtype": "float32"}
    assert start["classes"]["user"]["risks"] == ["Safe", "Unsafe", "Controversial"]
    assert len(start["classes"]["assistant"]["categories"]) == 8


def test_what_a_step_returns_is_in_the_file_by_then(audited: Engine, log: Path) -> None:
    """Under random operations: every label once, exactly, before anybody sees it."""
    rng = random.Random(1)
    returned: list[Label] = []
    streams = [audited.open(token_ids=[1, 2, 3], stream_id="first")]
    for index in range(120):
        stream = rng.choice(streams)
        action = rng.choice(
            ["append", "append", "step", "step", "fork", "rollback", "open", "close", "moderate"]
        )
        if action == "open" or (action == "fork" and len(streams) > 8):
            streams.append(
                audited.open(token_ids=rng.choices(range(512), k=rng.randint(1, 9)), tenant=f"t{index % 2}")
            )
        elif action == "append":
            stream.append(
                rng.choices(range(512), k=rng.randint(1, 5)), role=rng.choice(["user", "assistant"])
            )
        elif action == "fork":
            streams.append(stream.fork())
        elif action == "rollback":
            stream.rollback(rng.randint(0, len(stream.token_ids)))
        elif action == "close" and len(streams) > 1:
            streams.remove(stream)
            stream.close()
        elif action == "moderate":
            audited.core.run_until_computed([stream._state])  # others' labels come with the next step
            returned += [label for label in audited.step() if label.stream_id != stream.stream_id]
            continue
        elif action == "step":
            returned += audited.step()
        on_record = labels_in(log)
        assert set(map(as_logged, returned)) <= set(on_record)
    audited.run()
    for stream in streams:
        ours = {row for row in labels_in(log) if row[0] == stream.stream_id}
        assert {as_logged(label) for label in stream.labels if label.stream_id == stream.stream_id} <= ours
        stream.close()
    lines = records(log)
    assert [line["n"] for line in lines] == list(range(len(lines)))
    assert all(before["time"] <= after["time"] for before, after in pairwise(lines))


def test_every_event_is_on_record(tiny: Path, log: Path) -> None:
    policy = Policy.loose(debounce=1, hold_back=2, action="flag", on_timeout="open")
    with Engine.from_pretrained(tiny, **SMALL, audit_log=str(log)) as engine:
        stream = engine.open(token_ids=[1, 2, 3], policy=policy, stream_id="a", tenant="t", priority=1)
        stream.append([4, 5])
        engine.step()
        engine.core.fail(stream._state, "timeout")
        engine.core.fail(stream._state, "error")
        branch = stream.fork("b")
        branch.rollback(1)
        restored = engine.restore(branch.snapshot(), stream_id="c")
        restored.close()
        branch.close()
        verdict = stream.verdict
    events = [(line["event"], line.get("stream")) for line in records(log)]
    assert events == [
        *(("start", None), ("open", "a"), ("tokens", "a"), ("tokens", "a"), ("labels", "a")),
        *(("failure", "a"), ("failure", "a"), ("fork", "b"), ("rollback", "b"), ("restore", "c")),
        *(("close", "c"), ("close", "b"), ("close", "a"), ("end", None)),
    ]
    opened, first, second, said, passed, failed, fork, cut, *_, closed, _ = records(log)[1:]
    assert (opened["tenant"], opened["priority"], opened["policy"]["hold_back"]) == ("t", 1, 2)
    assert opened["policy"]["safe_risks"] == ["Controversial", "Safe"]
    assert (first["position"], first["ids"], first["wanted"]) == (0, [1, 2, 3], [["user", 2, 3]])
    assert (second["position"], second["ids"], second["wanted"]) == (3, [4, 5], [["assistant", 3, 5]])
    assert said["computed"] == 5
    assert len(said["labels"]) == 3
    assert (passed["failure"], passed["num_tokens"]) == ("timeout", 2)
    assert failed["failure"] == "error"
    assert failed["verdict"]["action"] == verdict.action == "block"
    assert failed["verdict"]["rule"] == verdict.rule
    assert failed["cleared"] == verdict.cleared
    assert fork["parent"] == "a"
    assert cut["tokens"] == 4
    assert (closed["tokens"], closed["computed"], closed["labels"]) == (5, 5, 3)


def test_the_verdict_is_there_when_it_changes(audited: Engine, log: Path) -> None:
    stream = audited.open(token_ids=[1, 2, 3], policy=Policy.strict(debounce=2))
    seen = [stream.verdict]
    for token_id in range(20):
        stream.append([token_id])
        audited.step()
        seen.append(stream.verdict)
    decided = [(v.action, v.risk, v.category, v.position, v.rule) for v in seen]
    changes = [now for before, now in pairwise(decided) if now != before]
    assert changes  # these weights find something
    assert [
        tuple(line["verdict"].values()) for line in records(log, "labels") if "verdict" in line
    ] == changes
    assert [line["cleared"] for line in records(log, "labels")] == [verdict.cleared for verdict in seen[1:]]


def test_whole_conversations_are_on_record_too(checkpoints: Any, log: Path) -> None:
    with Engine.from_pretrained(
        checkpoints("stream-tiny", dtype="float32"), **SMALL, audit_log=log
    ) as engine:
        moderation = engine.moderate(
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        )
    logged = labels_in(log)
    assert moderation.prompt is not None
    assert logged == [as_logged(label) for label in (moderation.prompt, *moderation.labels)]
    assert len(records(log, "close")) == 1


# -- the file --------------------------------------------------------------------------------------------------


def test_a_log_is_gone_on_with(tiny: Path, log: Path) -> None:
    log.write_bytes(b'{"n":0,"event":"start"}\n{"n":1,"eve')  # killed in the middle of a line
    for _ in range(2):
        with Engine.from_pretrained(tiny, **SMALL, audit_log=log):
            pass
    lines = log.read_bytes().split(b"\n")
    assert lines[1] == b'{"n":1,"eve'
    assert [json.loads(line)["event"] for line in lines[2:-1]] == ["start", "end", "start", "end"]


def test_the_file_may_be_copied_and_truncated(audited: Engine, log: Path) -> None:
    stream = audited.open(token_ids=[1, 2, 3])
    audited.step()
    old = log.read_bytes()
    os.truncate(log, 0)
    stream.append([4])
    audited.step()
    new = log.read_bytes()
    assert new.startswith(b'{"n":4,')
    assert len(old.splitlines()) == 4


def test_a_file_is_one_engines_and_its_owners(audited: Engine, tiny: Path, log: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, reason in (
        (log, "in use"),
        (tmp_path, "regular file"),
        (fifo, "regular file"),
        ("/dev/full", "regular"),
    ):
        with pytest.raises(ConfigError, match=reason):
            Engine.from_pretrained(tiny, **SMALL, audit_log=path)
    for path in (tmp_path / "no" / "where", "\0", "x" * 5000):
        with pytest.raises(ConfigError, match="audit_log"):
            Engine.from_pretrained(tiny, **SMALL, audit_log=path)
    for options in ({"audit_log": 5}, {"audit_log": log, "audit_token_ids": "no"}):
        with pytest.raises(ConfigError, match="audit_"):
            Engine.from_pretrained(tiny, **SMALL, **options)


def test_ids_can_be_kept_out(tiny: Path, log: Path) -> None:
    with Engine.from_pretrained(tiny, **SMALL, audit_log=log, audit_token_ids=False) as engine:
        stream = engine.open(token_ids=[401, 402, 403], stream_id="a")
        stream.append([404])
        stream.append([405, 406])
        branch = stream.fork("b")
        branch.rollback(2)
        branch.append([407])
        engine.restore(stream.snapshot(), "c")
        stream.rollback(3)
        stream.append([408])
        engine.run()
    assert not any("ids" in line for line in records(log))
    assert "401,402" not in log.read_text()
    so_far = [(3, [401, 402, 403]), (1, [401, 402, 403, 404]), (2, [401, 402, 403, 404, 405, 406])]
    expected = [*so_far, (1, [401, 402, 403, 404, 407]), (1, [401, 402, 403, 408])]
    digest = lambda ids: hashlib.sha256(array("i", ids).tobytes()).hexdigest()  # noqa: E731
    assert [(line["num_ids"], line["sha256"]) for line in records(log, "tokens")] == [
        (count, digest(ids)) for count, ids in expected
    ]
    (restored,) = records(log, "restore")
    assert restored["snapshot"]["token_ids"] == {"num_ids": 6, "sha256": digest(so_far[-1][1])}


def test_no_log_no_cost(engine: Engine) -> None:
    assert type(engine.core.recorder) is Recorder


def test_a_failure_after_close_is_counted_and_not_on_record(audited: Engine, log: Path) -> None:
    stream = audited.open(token_ids=[1, 2, 3])
    stream.close()
    audited.core.fail(stream._state, "error")
    assert sum(audited.core.failures.values()) == 1
    audited.step()  # writes what is buffered
    assert [line["event"] for line in records(log)][-1] == "close"
