"""What fails in the middle of things: the streams around it do not notice, and nothing is lost, leaked or doubled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import Clock, bits, by_stream, engine_over, faults, ids

from guardengine import Engine, IntegrityError, Label, Policy, Stream

BLOCK, NUM_BLOCKS = 4, 60
ERRORS = [RuntimeError("kernel"), MemoryError("no room for the batch"), KeyboardInterrupt()]
FLIGHTS = pytest.mark.parametrize("max_in_flight", [1, 2, 3])


@pytest.fixture(scope="module")
def loaded(checkpoints: Callable[..., Path]) -> Iterator[Engine]:
    folder = checkpoints(vocab_size=512, dtype="float32", num_hidden_layers=2)
    with Engine.from_pretrained(folder, kv_cache_bytes=2**18, max_model_len=128, block_size=BLOCK) as engine:
        yield engine


@pytest.fixture
def make(loaded: Engine) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def engine(**options: Any) -> Engine:
        made.append(engine_over(loaded, num_blocks=NUM_BLOCKS, max_num_batched_tokens=11, **options))
        return made[-1]

    yield engine
    for one in made:
        faults(one).clear()
        one.check_integrity()
        one.close()
        assert one.core.pool.num_free == NUM_BLOCKS


class Run:
    """Some streams with prompts and replies, played to the end whatever is raised on the way."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.labels: list[Label] = []
        self.raised: list[BaseException] = []
        self.streams: list[Stream] = []

    def call(self, call: Callable[[], Any]) -> Any:
        """Try until it works, as a caller would."""
        while True:
            try:
                return call()
            except (RuntimeError, MemoryError, KeyboardInterrupt) as error:
                self.raised.append(error)
                self.engine.check_integrity()

    def step(self) -> None:
        self.labels += self.call(self.engine.step)
        self.engine.check_integrity()

    def play(self) -> Run:
        for seed, length in enumerate((20, 3, 9)):
            prompt = [*ids(8), *ids(length, seed)]
            self.streams.append(self.call(lambda p=prompt: self.engine.open(token_ids=p)))
            self.step()
        for turn in range(4):
            for index, stream in enumerate(self.streams):
                more = ids(1 + (turn + index) % 5, seed=10 * turn + index)
                self.call(lambda s=stream, m=more: s.append(m))
            self.step()
            if turn == 1:
                self.streams.append(self.call(self.streams[0].fork))
        while self.engine.core.has_work:
            self.step()
        return self

    def result(self) -> list[Any]:
        """Each stream's ids and labels. Labels come once and in order, whatever the steps."""
        emitted = by_stream(self.labels)
        for stream in self.streams[:3]:
            mine = [bits(stream.prompt_label), *map(bits, stream.labels)]  # type: ignore[arg-type]
            assert emitted[stream.stream_id] == mine
        return [(stream.token_ids, [bits(label) for label in stream.labels]) for stream in self.streams]


@pytest.fixture(scope="module")
def undisturbed(loaded: Engine) -> list[Any]:
    return Run(engine_over(loaded, num_blocks=NUM_BLOCKS, max_num_batched_tokens=11)).play().result()


# -- steps that fail -----------------------------------------------------------------------------------------


@pytest.mark.slow
@FLIGHTS
@pytest.mark.parametrize("name", ["launch", "compute", "wait"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_step_may_fail(make, undisturbed, max_in_flight: int, name: str, error: BaseException) -> None:
    for after in range(9):
        engine = make(max_in_flight=max_in_flight)
        faults(engine).plant(name, error, after)
        run = Run(engine).play()
        assert run.result() == undisturbed
        if faults(engine)._planted.get(name):  # there are no so many
            assert after > 5
            break
        # A launch that fails behind one in flight comes up again after it: nobody need be told.
        assert run.raised == [error] or (max_in_flight > 1 and run.raised == [])


@FLIGHTS
def test_many_steps_in_a_row_may_fail(make, undisturbed, max_in_flight: int) -> None:
    engine = make(max_in_flight=max_in_flight)
    for name in ("launch", "compute", "wait"):
        for after in range(0, 12, 2):
            faults(engine).plant(name, RuntimeError(f"{name} {after}"), after)
    run = Run(engine).play()
    assert run.result() == undisturbed
    assert len(run.raised) >= 6


@pytest.mark.parametrize("part", ["probabilities", "labels"])
@FLIGHTS
def test_labels_that_cannot_be_read_come_with_the_next_step(
    make, undisturbed, monkeypatch: pytest.MonkeyPatch, part: str, max_in_flight: int
) -> None:
    engine = make(max_in_flight=max_in_flight)
    readout = engine.core.readout
    original, calls = getattr(readout, part), iter(range(10**6))

    def fail(*args: Any) -> Any:
        if next(calls) in (1, 5, 6):
            raise MemoryError(part)
        return original(*args)

    monkeypatch.setattr(readout, part, fail)
    run = Run(engine).play()
    assert run.result() == undisturbed
    assert len(run.raised) == 3


@FLIGHTS
def test_what_fails_while_a_stream_changes_is_left_to_the_next_step(make, max_in_flight: int) -> None:
    """Fork, rollback and close wait for what is in flight. That it failed is not theirs to say."""
    for change in ("fork", "rollback", "close"):
        engine = make(max_in_flight=max_in_flight)
        streams = [engine.open(token_ids=ids(30, seed), role="assistant") for seed in range(3)]
        labels = engine.step()
        faults(engine).plant("wait", RuntimeError("kernel"))
        if change == "fork":
            streams.append(streams[0].fork())
        elif change == "rollback":
            streams[0].rollback(25)
        else:
            streams.pop(0).close()
        engine.check_integrity()
        if max_in_flight == 1:
            with pytest.raises(RuntimeError):
                engine.step()
        labels += engine.run()
        for stream in streams:
            with engine_alone(engine, stream) as expected:
                assert [bits(label) for label in stream.labels] == expected
        emitted = by_stream(labels)
        assert emitted[streams[1].stream_id] == [bits(label) for label in streams[1].labels]


class engine_alone:
    """The labels of a stream's tokens in the same engine, computed again."""

    def __init__(self, engine: Engine, stream: Stream) -> None:
        self.engine, self.token_ids = engine, stream.token_ids

    def __enter__(self) -> list[Any]:
        self.stream = self.engine.open(token_ids=self.token_ids, role="assistant", cache_salt="alone")
        self.engine.run()
        return [bits(label) for label in self.stream.labels]

    def __exit__(self, *_: object) -> None:
        self.stream.close()


@pytest.mark.parametrize("max_in_flight", [2, 3])
def test_changes_while_steps_are_in_flight(make, max_in_flight: int) -> None:
    engine = make(max_in_flight=max_in_flight)
    parent = engine.open(token_ids=ids(40), role="assistant")
    other = engine.open(token_ids=ids(25, 1), role="assistant")
    labels = engine.step()
    assert len(engine.core.pipeline) == max_in_flight - 1
    branch = parent.fork()
    assert len(engine.core.pipeline) == 0
    branch.append([1, 2])
    labels += engine.step()
    parent.rollback(35)
    labels += engine.step()
    parent.append([7] * 9)
    labels += engine.step()
    twig = branch.fork()
    branch.close()
    labels += engine.run()
    engine.check_integrity()
    for stream in (parent, other, twig):
        with engine_alone(engine, stream) as expected:
            assert [bits(label) for label in stream.labels] == expected
    emitted = by_stream(labels)
    assert emitted[other.stream_id] == [bits(label) for label in other.labels]


# -- calls that fail -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_copies_may_fail(make, undisturbed, error: BaseException) -> None:
    for after in range(2):
        engine = make()
        faults(engine).plant("copy_block", error, after)
        run = Run(engine).play()
        assert run.result() == undisturbed
        assert run.raised in ([error], [])


def test_a_failed_copy_of_a_pending_fork_opens_nothing(make) -> None:
    engine = make()
    parent = engine.open(token_ids=ids(22), role="assistant")
    engine.step()
    faults(engine).plant("copy_block", MemoryError("planted"))
    before = engine.stats()
    with pytest.raises(MemoryError):
        parent.fork("branch")
    assert engine.stats() == before
    engine.check_integrity()
    branch = parent.fork("branch")
    engine.run()
    with engine_alone(engine, parent) as expected:
        assert [bits(label) for label in branch.labels] == expected


# -- slow steps ------------------------------------------------------------------------------------------------


def test_a_slow_step_costs_those_that_were_in_a_hurry_and_nobody_else(make, undisturbed) -> None:
    clock = Clock()
    engine = make(clock=clock)
    calm = Policy.strict(risk_thresholds={"Unsafe": 1.0, "Controversial": 1.0})
    hurried = engine.open(token_ids=ids(9, seed=77), policy=calm, timeout_s=1)
    patient = engine.open(token_ids=ids(9, seed=78), policy=calm, timeout_s=1000)

    def wait(num_tokens: int) -> None:
        clock.now += 100

    engine.core.runner.on_wait = wait
    run = Run(engine).play()
    assert run.result() == undisturbed
    assert (hurried.verdict.rule, patient.verdict.rule) == ("timeout", "none")
    assert hurried.prompt_label is not None
    assert engine.stats()["failures"] == {"timeout-closed": 1}


# -- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda core, a, b: a.block_table.__setitem__(0, b.block_table[0]), "on the books"),
        (lambda core, a, b: a.block_table.insert(0, a.block_table.pop(1)), "holds other tokens than its own"),
        (lambda core, a, b: a.block_table.pop(), "on the books|blocks for"),
        (lambda core, a, b: core.pool._free.append(a.block_table[0]), "free list"),
        (lambda core, a, b: core.pool._free.pop(), "free list"),
        (lambda core, a, b: core.scheduler.discard(b), "pending"),
        (lambda core, a, b: setattr(a, "num_computed_tokens", 3), None),
        (lambda core, a, b: core.admission._pending.__setitem__(b.stream_id, 0), "pending tokens"),
        (lambda core, a, b: core.residency.idle.discard(a), "idle on the books"),
        (lambda core, a, b: core.residency.idle.pop_resident(), "idle with blocks"),
        (lambda core, a, b: setattr(b, "num_scheduled_tokens", 99), "99 scheduled"),
        (lambda core, a, b: setattr(b, "num_seen_tokens", -1), "seen"),
    ],
)
def test_check_integrity_catches_damage(loaded: Engine, damage, message: str | None) -> None:
    engine = engine_over(loaded, num_blocks=NUM_BLOCKS)
    idle = engine.open(token_ids=ids(10), role="assistant")._state
    engine.run()
    pending = engine.open(token_ids=ids(10, seed=1))._state
    engine.check_integrity()
    damage(engine.core, idle, pending)
    if message is None:
        engine.check_integrity()  # harmless: it is computed again
        return
    with pytest.raises(IntegrityError, match=message):
        engine.check_integrity()
