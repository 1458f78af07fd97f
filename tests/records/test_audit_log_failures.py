"""An audit log that cannot be written: nothing is handed out that is not in it, and nothing goes missing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from audit_logs import SMALL, as_logged, labels_in, records
from fakes import FakeRunner

from guardengine import AsyncEngine, AuditError, Engine, StreamClosed
from guardengine.core.isolation import step_apart


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def audited(tiny: Path, log: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(tiny, **SMALL, audit_log=log) as engine:
        yield engine
        engine.check_integrity()


class BrokenDisk:
    """Stands in for the file: takes `room` bytes, then fails."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = min(self.room, len(data))
        self.room -= taken
        return int(self.file.write(bytes(data[:taken])))

    def close(self) -> None:
        self.file.close()


def break_disk(engine: Engine | None, room: int = 0) -> BrokenDisk:
    assert engine is not None
    log = engine.core.recorder.log  # type: ignore[attr-defined]
    log._file = disk = BrokenDisk(log._file, room)
    return disk


def test_nothing_is_handed_out_that_is_not_on_record(audited: Engine, log: Path) -> None:
    stream = audited.open(token_ids=[1, 2, 3])
    audited.step()
    stream.append([4, 5])
    disk = break_disk(audited, room=300)  # enough for what was appended, not for its labels
    num_steps = audited.stats()["steps"]
    for _ in range(3):
        with pytest.raises(AuditError, match=r"audit\.jsonl.*No space"):
            audited.step()
    assert audited.stats()["steps"] == num_steps + 1  # the model did not run again, in vain
    for refused in (
        lambda: stream.append([6]),
        lambda: stream.fork(),
        lambda: stream.rollback(1),
        lambda: audited.open(token_ids=[1]),
        lambda: audited.restore(stream.snapshot(), "again"),
        lambda: audited.run(),
    ):
        with pytest.raises(AuditError):
            refused()
    assert len(audited.core.states) == 1
    assert len(stream.token_ids) == 5
    disk.room = 10**6
    labels = audited.step()
    assert [label.position for label in labels] == [3, 4]
    assert labels_in(log)[-2:] == [as_logged(label) for label in labels]
    stream.append([6])
    assert len(audited.run()) == 1
    assert [line["n"] for line in records(log)] == list(range(len(records(log))))


def test_an_async_engine_fails_appends_until_the_log_can_be_written(tiny: Path, log: Path) -> None:
    async def run() -> None:
        async with AsyncEngine.from_pretrained(tiny, **SMALL, audit_log=log) as engine:
            stream = await engine.open(token_ids=[1, 2, 3], stream_id="a")
            assert len(await stream.append([4, 5])) == 2
            disk = break_disk(engine.thread.engine)
            for _ in range(2):
                with pytest.raises(AuditError):
                    await asyncio.wait_for(stream.append([6], timeout_s=20), 10)
            other = asyncio.create_task(stream.append([7]))
            disk.room = 10**6
            with contextlib.suppress(AuditError):
                await other
            while engine.thread.core.recorder.is_failing:
                await asyncio.sleep(0.01)
            assert len(await stream.append([8])) == 1
            assert (await engine.health())["status"] == "ok"
            labels = stream.labels
        assert [as_logged(label) for label in labels] == [
            row for row in labels_in(log) if row[2] == "assistant"
        ]
        assert records(log)[-1]["event"] == "end"

    asyncio.run(run())


def test_an_async_engine_closes_with_the_disk_full(tiny: Path, log: Path) -> None:
    async def run() -> None:
        async with AsyncEngine.from_pretrained(tiny, **SMALL, audit_log=log) as engine:
            stream = await engine.open(token_ids=[1, 2, 3])
            break_disk(engine.thread.engine)
            with pytest.raises(AuditError):
                await stream.append([4])
        assert isinstance(engine.thread.error, AuditError)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_streams_can_be_closed_while_the_disk_is_full(audited: Engine, log: Path) -> None:
    stream = audited.open(token_ids=[1, 2, 3])
    disk = break_disk(audited)
    with pytest.raises(AuditError):
        audited.step()
    stream.close()
    assert audited.stats()["streams_open"] == 0
    with pytest.raises(AuditError):
        audited.close()
    with pytest.raises(StreamClosed):
        audited.open(token_ids=[1])
    disk.room = 10**6
    audited.close()  # writes what was left
    audited.close()
    assert [line["event"] for line in records(log)] == ["start", "open", "tokens", "close", "end"]


def test_writes_that_come_short_leave_whole_lines(audited: Engine, log: Path) -> None:
    disk = break_disk(audited)
    stream = audited.open(token_ids=[1, 2, 3])
    for room in (1, 100, 7, 300, 64, 10**6):
        disk.room = room
        try:
            audited.step()
        except AuditError:
            continue
        break
    assert [line["event"] for line in records(log)] == ["start", "open", "tokens", "labels"]
    assert stream.prompt_label is not None


def test_steps_in_flight_are_not_handed_out_by_other_calls(audited: Engine, log: Path) -> None:
    core = audited.core
    runner = core.runner
    core.pipeline._runner = FakeRunner(runner, max_in_flight=2)  # type: ignore[assignment]
    streams = [audited.open(token_ids=[i, 2, 3]) for i in range(2)]
    audited.run()
    for stream in streams:
        stream.append([4])
        core.pipeline.launch_waiting()
    disk = break_disk(audited)
    assert len(core.pipeline) == 2
    with pytest.raises(AuditError):
        streams[0].rollback(1)  # waits for them first
    assert len(streams[0].token_ids) == 4
    disk.room = 10**6
    assert [label.position for label in audited.run()] == [3, 3]
    assert len(labels_in(log)) == 4
    streams[0].append([5])
    core.pipeline.launch_waiting()
    disk.room = 0
    streams[0].close()  # all the same
    disk.room = 10**6
    assert len(core.pipeline) == 0
    assert audited.run() == []
    assert len(labels_in(log)) == 5


def test_a_full_disk_is_no_streams_fault(audited: Engine) -> None:
    streams = [audited.open(token_ids=[i, 2, 3]) for i in range(4)]
    break_disk(audited)
    for suspects in (streams, streams[:1]):
        audited.core.pipeline.suspects = [stream._state for stream in suspects]  # of an earlier failure
        with pytest.raises(AuditError):
            step_apart(audited.core, audited.canary)
    assert [stream.verdict.rule for stream in streams] == ["none"] * 4
    audited.core.recorder.log._file.room = 10**6  # type: ignore[attr-defined]
    assert len(audited.run()) == 4
