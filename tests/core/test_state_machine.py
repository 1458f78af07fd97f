"""Random sequences of open / append / step / fork / rollback / close, valid and not, with faults, on engines with
little room: prefix hits, preemption, priorities, tenants, deadlines, steps in flight.

After every operation the books are checked; every label is compared with a fresh recompute of the stream's
tokens; every label comes once, in order; every refused or failed call leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import pytest
import torch
from fakes import Clock, engine_over, faults
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from stream_model import Model

from guardengine import (
    AutoGuard,
    Engine,
    GuardEngineError,
    InvalidTokens,
    Label,
    Overloaded,
    Policy,
    Stream,
    StreamClosed,
    StreamTooLong,
)

VOCAB = 512
BLOCK, MAX_LEN, MAX_STREAMS, BUDGET = 4, 40, 6, 7
MAX_BLOCKS, MAX_PENDING, MAX_PENDING_OF_TENANT, MAX_STREAMS_OF_TENANT, TTL = 40, 70, 45, 4, 30
LIMITS = {
    "max_model_len": MAX_LEN,
    "max_num_streams": MAX_STREAMS,
    "max_num_batched_tokens": BUDGET,
    "max_streams_per_tenant": MAX_STREAMS_OF_TENANT,
    "max_pending_tokens": MAX_PENDING,
    "max_pending_tokens_per_tenant": MAX_PENDING_OF_TENANT,
    "idle_ttl_s": TTL,
}
BLOCK_BYTES = 2 * 2 * BLOCK * 2 * 32 * 4  # layers, k and v, tokens, kv heads, head_dim, float32
# Few beginnings, so that streams often begin alike.
BEGINNINGS = ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 5, 9, 9, 9], [0] * 12)
TOKENS = st.one_of(
    st.builds(lambda ids, n: ids[:n], st.sampled_from(BEGINNINGS), st.sampled_from([4, 8, 11, 12])),
    st.builds(lambda ids, n: ids[:n], st.sampled_from(BEGINNINGS), st.integers(1, 12)),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
)
NONSENSE = st.sampled_from([[], [VOCAB], [-1], [1, 2, 10**12], [1.5], "abc", [[1]], None, ["1"], [2**80]])
FEW = st.sampled_from([0, 1, 1, 2, 4, 8])  # steps
ROLES = st.sampled_from(["user", "assistant"])
TIMEOUTS = st.sampled_from([None, None, 1, 5])
# No label is a hit, so that a verdict is that of the deadlines.
POLICY = Policy.strict(risk_thresholds={"Unsafe": 1.0, "Controversial": 1.0})


class Fault(Exception):
    """Planted."""


class Machine(RuleBasedStateMachine):
    loaded: Engine
    oracle: AutoGuard  # one-shot, no shared cache
    max_in_flight: int

    def __init__(self) -> None:
        super().__init__()
        self.live: list[tuple[Stream, Model]] = []
        self.closed: list[Stream] = []

    @initialize(
        num_blocks=st.one_of(st.integers(10, 14), st.integers(10, MAX_BLOCKS)),
        prefix_caching=st.sampled_from([True, True, False]),
        options=st.fixed_dictionaries({}, optional={"kv_reserve": st.just(0.1), "max_step_ms": st.just(4.0)}),
    )
    def start(self, num_blocks: int, prefix_caching: bool, options: dict[str, float]) -> None:
        self.clock = Clock()
        self.reserve = int(options.get("kv_reserve", 0) * num_blocks)
        limits = {**LIMITS, **options, "prefix_caching": prefix_caching}
        self.engine = engine_over(
            self.loaded,
            num_blocks=num_blocks,
            clock=self.clock,
            max_in_flight=self.max_in_flight,
            **limits,
        )
        assert self.engine.stats()["kv_blocks_total"] == num_blocks

    def pick(self, index: int) -> tuple[Stream, Model]:
        return self.live[index % len(self.live)]

    def recorded(self, stream: Stream) -> list[Label]:
        state = stream._state
        return sorted(state.labels + state.prompt_labels, key=lambda label: label.position)

    def delivered(self, stream: Stream) -> list[Label]:
        undelivered = self.engine.core.undelivered
        kept = {id(label) for label in undelivered if label.stream_id == stream.stream_id}
        return [label for label in self.recorded(stream) if id(label) not in kept]

    def due(self, timeout_s: float | None) -> float | None:
        return None if timeout_s is None else self.clock.now + timeout_s

    def forget_expired(self) -> None:
        for stream, model in self.live[:]:
            if stream.is_closed:
                assert stream.num_pending_tokens == 0
                self.live.remove((stream, model))
                self.closed.append(stream)

    @contextmanager
    def may_be_refused(self, tenant: str, num_tokens: int, stream: Stream | None = None) -> Iterator[None]:
        """A call that may be refused, for a reason, or fail where that was planted."""
        try:
            yield
        except Fault:
            pass
        except Overloaded:
            self.forget_expired()
            busy = [s for s, _ in self.live if s.num_pending_tokens]
            of_tenant = [s for s, m in self.live if m.tenant == tenant]
            held = {block for s in busy for block in s._state.block_table}
            own = stream._state.block_table if stream else []
            length = num_tokens + (len(stream.token_ids) if stream else 0)
            room = self.engine.core.pool.num_blocks - len(held.union(own))
            needed = -(-length // BLOCK) - len(own) + bool(own)  # perhaps a copy
            needed += 0 if stream else self.reserve
            pending = self.engine.core.admission.total.num_pending_tokens
            assert (
                (stream is None and len(self.live) == MAX_STREAMS)
                or (stream is None and len(of_tenant) == MAX_STREAMS_OF_TENANT)
                or pending + num_tokens > MAX_PENDING
                or sum(s.num_pending_tokens for s in of_tenant) + num_tokens > MAX_PENDING_OF_TENANT
                or room < needed
            )

    # -- valid operations ------------------------------------------------------------------------------

    @rule(
        ids=TOKENS,
        role=ROLES,
        tenant=st.sampled_from(["", "", "a"]),
        priority=st.integers(-3, 3),
        timeout_s=TIMEOUTS,
        then=FEW,
    )
    def open(
        self, ids: list[int], role: str, tenant: str, priority: int, timeout_s: float | None, then: int
    ) -> None:
        with self.may_be_refused(tenant, len(ids)):
            due = self.due(timeout_s)
            stream = self.engine.open(
                token_ids=ids, role=role, tenant=tenant, priority=priority, timeout_s=timeout_s, policy=POLICY
            )
            model = Model(tenant)
            model.feed(ids, role, due)
            self.live.append((stream, model))
        self.forget_expired()
        self.steps(then)

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 99), ids=TOKENS, role=ROLES, timeout_s=TIMEOUTS, then=FEW)
    def append(self, index: int, ids: list[int], role: str, timeout_s: float | None, then: int) -> None:
        if not self.live:
            return
        stream, model = self.pick(index)
        with self.may_be_refused(model.tenant, len(ids), stream):
            try:
                stream.append(ids, role=role, timeout_s=timeout_s)
            except StreamTooLong:
                assert len(model.ids) + len(ids) > MAX_LEN
            else:
                assert len(model.ids) + len(ids) <= MAX_LEN
                model.feed(ids, role, self.due(timeout_s))
        self.steps(then)

    def step(self) -> None:
        pending = self.engine.stats()["tokens_pending"]
        self.forget_expired()
        now = self.clock.now
        late = [
            stream
            for stream, model in self.live
            if any(time <= now and stream._state.num_seen_tokens < end for time, _, end in model.due)
        ]
        try:
            labels = self.engine.step()
        except Fault:
            return
        if self.max_in_flight == 1 and self.engine.core.options.max_step_ms is None:
            assert self.engine.stats()["tokens_pending"] <= max(0, pending - BUDGET)
        assert all(stream.verdict.rule == "timeout" for stream in late)
        models = {stream.stream_id: model for stream, model in self.live}
        for label in labels:
            model = models[label.stream_id]
            assert (label.position, label.role) == model.owed.pop(0)
            assert label.token_id == model.ids[label.position]
            model.given.append(label)

    @rule(num_steps=FEW)
    def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 99))
    def compute(self, index: int) -> None:
        """As AutoGuard does: step until one stream is done, whose labels the caller reads off it."""
        stream, model = self.pick(index)
        try:
            self.engine.core.run_until_computed([stream._state])
        except Fault:
            pass
        else:
            assert stream.num_pending_tokens == 0
        model.settle(self.delivered(stream))
        self.forget_expired()

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 99))
    def fork(self, index: int) -> None:
        stream, model = self.pick(index)
        unseen = len(model.ids) - stream._state.num_seen_tokens
        with self.may_be_refused(model.tenant, len(model.ids)):
            branch = stream.fork()
            assert branch.num_pending_tokens == 0 or unseen
            copy = Model(model.tenant, model.ids[:], model.owed[:], due=model.due[:])
            copy.settle(self.recorded(branch))
            self.live.append((branch, copy))

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 99), num_tokens=st.integers(0, 20))
    def rollback(self, index: int, num_tokens: int) -> None:
        if not self.live:
            return
        stream, model = self.pick(index)
        if num_tokens > len(model.ids):
            with pytest.raises(InvalidTokens):
                stream.rollback(num_tokens)
        else:
            stream.rollback(num_tokens)
            model.cut(num_tokens)

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 99), num_tokens=st.integers(1, 7), ids=TOKENS, then=FEW)
    def rewrite(self, index: int, num_tokens: int, ids: list[int], then: int) -> None:
        """As an LLM that regenerates."""
        self.compute(index)
        self.rollback(index, num_tokens)
        self.append(index, ids, "assistant", None, then)

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 99), is_abandoned=st.booleans())
    def close(self, index: int, is_abandoned: bool) -> None:
        stream, model = self.live.pop(index % len(self.live))
        if is_abandoned:
            self.engine.core.abandon(stream._state)
            self.engine.core.sweep()
        else:
            stream.close()
        self.closed.append(stream)
        assert stream.token_ids == model.ids
        self.forget_expired()

    @rule(seconds=st.sampled_from([0.5, 2.0, 20.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(
        name=st.sampled_from(["launch", "compute", "wait", "copy_block"]),
        kind=st.sampled_from([RuntimeError, MemoryError]),
        after=st.integers(0, 2),
    )
    def plant_a_fault(self, name: str, kind: type[Exception], after: int) -> None:
        error = type(f"Planted{kind.__name__}", (Fault, kind), {})(name)
        faults(self.engine).plant(name, error, after)

    # -- calls that must be refused --------------------------------------------------------------------

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 99), bad=NONSENSE)
    def nonsense(self, index: int, bad: object) -> None:
        stream, _ = self.pick(index)
        self.engine.stats()  # closes what has expired
        self.forget_expired()
        if stream.is_closed:
            return
        for call in (
            lambda: stream.append(bad),  # type: ignore[arg-type]
            lambda: self.engine.open(token_ids=bad),  # type: ignore[arg-type]
            lambda: stream.append([1], role="system"),  # type: ignore[arg-type]
            lambda: stream.append([1], timeout_s=0),
            lambda: stream.append([1] * (MAX_LEN + 1)),
            lambda: self.engine.open(token_ids=[1], stream_id=stream.stream_id),
            lambda: self.engine.open(token_ids=[1], priority=4),
            lambda: stream.rollback(-1),
        ):
            with pytest.raises(GuardEngineError):
                call()

    @precondition(lambda self: self.closed)
    @rule(index=st.integers(0, 99))
    def use_after_close(self, index: int) -> None:
        stream = self.closed[index % len(self.closed)]
        for call in (lambda: stream.append([1]), stream.fork, lambda: stream.rollback(0)):
            with pytest.raises(StreamClosed):
                call()
        stream.close()

    # -- what always holds -----------------------------------------------------------------------------

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check_integrity()
        for stream, model in self.live:
            assert stream.token_ids == model.ids
            assert self.delivered(stream) == model.given
            known = {(label.position, label.role) for label in self.recorded(stream)}
            owes_prompt = any(role == "user" and (p, role) not in known for p, role in model.owed)
            prompts = stream._state.prompt_labels
            assert stream.prompt_label is (prompts[-1] if prompts and not owes_prompt else None)
            if stream.verdict.rule != "none":
                assert stream.verdict.rule == "timeout"
            assert 0 <= stream.verdict.cleared <= len(model.ids)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        faults(self.engine).clear()
        while self.engine.core.has_work:
            self.step()
        for stream, model in self.live:
            assert not model.owed
            for label in model.given:
                risk, category = self.fresh(tuple(model.ids), label)
                np.testing.assert_allclose(label.risk_logits, risk, atol=1e-4)
                np.testing.assert_allclose(label.category_logits, category, atol=1e-4)
            stream.close()
        assert self.engine.stats()["kv_blocks_free"] == self.engine.stats()["kv_blocks_total"]
        self.engine.close()

    def fresh(self, ids: tuple[int, ...], label: Label) -> tuple[np.ndarray, np.ndarray]:
        logits = _fresh_logits(self.oracle, ids)
        names = ("query_risk_level_logits", "query_category_logits")
        if label.role == "assistant":
            names = ("risk_level_logits", "category_logits")
        risk, category = (getattr(logits, name)[0, label.position].numpy() for name in names)
        return risk, category


@lru_cache(maxsize=512)
def _fresh_logits(oracle: AutoGuard, ids: tuple[int, ...]):
    return oracle(torch.tensor([ids]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "max_in_flight", "max_examples"), [("cpu", 1, 70), ("reference", 1, 20), ("reference", 2, 50)]
)
def test_random_operations(checkpoints, backend: str, max_in_flight: int, max_examples: int) -> None:
    folder = checkpoints(vocab_size=VOCAB, dtype="float32", num_hidden_layers=2)
    Machine.loaded = Engine.from_pretrained(
        folder,
        backend=backend,
        kv_cache_bytes=MAX_BLOCKS * BLOCK_BYTES,
        block_size=BLOCK,
        max_model_len=MAX_LEN,
    )
    Machine.max_in_flight = max_in_flight
    Machine.oracle = AutoGuard.from_pretrained(
        folder, backend="reference", kv_cache_bytes=2**22, max_model_len=MAX_LEN, prefix_caching=False
    )
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
