"""Random sequences of open / append / step / fork / rollback / close, valid and not.

After every operation the books are checked; every label is compared with a fresh recompute of the stream's
tokens; every label comes once, in order; every refused call leaves everything as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
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
from native_ops import HOST_BACKENDS

from guardengine import (
    AutoGuard,
    ConfigError,
    Engine,
    GuardEngineError,
    InvalidTokens,
    Label,
    Overloaded,
    Stream,
    StreamClosed,
    StreamTooLong,
)

VOCAB = 512
BLOCK, MAX_LEN, MAX_STREAMS, BUDGET = 4, 40, 5, 7
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)
ROLES = st.sampled_from(["user", "assistant"])


@dataclass
class Model:
    """What a stream should be: its ids, and which labels it owes or has given."""

    ids: list[int] = field(default_factory=list)
    owed: list[tuple[int, str]] = field(default_factory=list)
    given: list[Label] = field(default_factory=list)

    def feed(self, ids: list[int], role: str) -> None:
        start, end = len(self.ids), len(self.ids) + len(ids)
        self.ids += ids
        self.owed += [(end - 1, role)] if role == "user" else [(p, role) for p in range(start, end)]

    def cut(self, num_tokens: int) -> None:
        length = len(self.ids) - num_tokens
        self.ids = self.ids[:length]
        self.owed = [x for x in self.owed if x[0] < length]
        self.given = [x for x in self.given if x.position < length]


class Machine(RuleBasedStateMachine):
    engine: Engine
    oracle: AutoGuard  # one-shot, no shared cache
    checkpoint: Path
    backend: str

    def __init__(self) -> None:
        super().__init__()
        self.live: list[tuple[Stream, Model]] = []
        self.closed: list[Stream] = []

    @initialize(num_blocks=st.integers(12, 40))
    def start(self, num_blocks: int) -> None:
        block_bytes = 2 * 2 * BLOCK * 2 * 32 * 4  # layers, k and v, tokens, kv heads, head_dim, float32
        self.engine = Engine.from_pretrained(
            self.checkpoint,
            kv_cache_bytes=num_blocks * block_bytes,
            block_size=BLOCK,
            max_model_len=MAX_LEN,
            max_num_streams=MAX_STREAMS,
            max_num_batched_tokens=BUDGET,
            backend=self.backend,
        )
        assert self.engine.stats()["kv_blocks_total"] == num_blocks
        self.engine.core.runner.kv_cache.fill_(float("nan"))

    def pick(self, index: int) -> tuple[Stream, Model]:
        return self.live[index % len(self.live)]

    # -- valid operations ------------------------------------------------------------------------------

    @rule(ids=TOKENS, role=ROLES)
    def open(self, ids: list[int], role: str) -> None:
        try:
            stream = self.engine.open(token_ids=ids, role=role)
        except Overloaded:
            stats = self.engine.stats()
            busy = sum(s.num_pending_tokens > 0 for s, _ in self.live)
            assert len(self.live) == MAX_STREAMS or (busy and stats["kv_blocks_free"] * BLOCK < len(ids))
            return
        model = Model()
        model.feed(ids, role)
        self.live.append((stream, model))

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 99), ids=TOKENS, role=ROLES)
    def append(self, index: int, ids: list[int], role: str) -> None:
        stream, model = self.pick(index)
        try:
            stream.append(ids, role=role)
        except StreamTooLong:
            assert len(model.ids) + len(ids) > MAX_LEN
        except Overloaded:
            # A stream that lost its blocks needs them all again.
            assert self.engine.stats()["kv_blocks_free"] * BLOCK < len(model.ids) + len(ids) + BLOCK
        else:
            assert len(model.ids) + len(ids) <= MAX_LEN
            model.feed(ids, role)

    @rule()
    def step(self) -> None:
        pending = self.engine.stats()["tokens_pending"]
        labels = self.engine.step()
        assert self.engine.stats()["tokens_pending"] <= max(0, pending - BUDGET)
        models = {stream.stream_id: model for stream, model in self.live}
        for label in labels:
            model = models[label.stream_id]
            assert (label.position, label.role) == model.owed.pop(0)
            assert label.token_id == model.ids[label.position]
            model.given.append(label)

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 99))
    def fork(self, index: int) -> None:
        stream, model = self.pick(index)
        try:
            branch = stream.fork()
        except Overloaded:
            return
        self.live.append((branch, Model(model.ids[:], model.owed[:], model.given[:])))

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 99), num_tokens=st.integers(0, 20))
    def rollback(self, index: int, num_tokens: int) -> None:
        stream, model = self.pick(index)
        if num_tokens > len(model.ids):
            with pytest.raises(InvalidTokens):
                stream.rollback(num_tokens)
        else:
            stream.rollback(num_tokens)
            model.cut(num_tokens)

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 99))
    def close(self, index: int) -> None:
        stream, model = self.live.pop(index % len(self.live))
        stream.close()
        self.closed.append(stream)
        assert stream.token_ids == model.ids

    # -- calls that must be refused --------------------------------------------------------------------

    @precondition(lambda self: self.live)
    @rule(
        index=st.integers(0, 99),
        bad=st.sampled_from([[], [VOCAB], [-1], [1, 2, 10**12], [1.5], "abc", [[1]], None, ["1"], [2**80]]),
    )
    def append_nonsense(self, index: int, bad: object) -> None:
        with pytest.raises(InvalidTokens):
            self.pick(index)[0].append(bad)  # type: ignore[arg-type]
        with pytest.raises(GuardEngineError):
            self.engine.open(token_ids=bad)  # type: ignore[arg-type]

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 99))
    def other_nonsense(self, index: int) -> None:
        stream, _ = self.pick(index)
        with pytest.raises(ConfigError):
            stream.append([1], role="system")  # type: ignore[arg-type]
        with pytest.raises(GuardEngineError):
            self.engine.open(token_ids=[1], stream_id=stream.stream_id)
        with pytest.raises(InvalidTokens):
            stream.rollback(-1)
        with pytest.raises(StreamTooLong):
            stream.append([1] * (MAX_LEN + 1))

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
            assert stream.labels == [x for x in model.given if x.role == "assistant"]
            owes_prompt = any(role == "user" for _, role in model.owed)
            prompts = [x for x in model.given if x.role == "user"]
            assert stream.prompt_label is (prompts[-1] if prompts and not owes_prompt else None)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.stats()["tokens_pending"]:
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


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_random_operations(checkpoints, backend: str) -> None:
    folder = checkpoints(vocab_size=VOCAB, dtype="float32", num_hidden_layers=2)
    Machine.checkpoint, Machine.backend = folder, backend
    Machine.oracle = AutoGuard.from_pretrained(
        folder, backend="reference", kv_cache_bytes=2**22, max_model_len=MAX_LEN
    )
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
