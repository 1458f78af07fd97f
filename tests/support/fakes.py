"""Engines for tests: a new core over a runner that is already loaded, with what tests put in its parts' places."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

from guardengine import Engine, EngineConfig, Label, Policy
from guardengine.core.block_pool import BlockPool
from guardengine.core.engine_core import EngineCore
from guardengine.core.prefix_cache import PrefixCache
from guardengine.core.readout import Readout
from guardengine.core.state import StreamState
from guardengine.runners.batch import Batch
from guardengine.runners.runner import Runner, Scores


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Faults:
    """What goes wrong in a runner: the call of `name` after `after` good ones raises `error`, once."""

    def __init__(self) -> None:
        self._planted: dict[str, list[tuple[int, BaseException]]] = {}

    def plant(self, name: str, error: BaseException, after: int = 0) -> None:
        self._planted.setdefault(name, []).append((after, error))

    def clear(self) -> None:
        self._planted.clear()

    def check(self, name: str) -> None:
        left = self._planted.pop(name, [])
        for after, _ in left:
            if not after:
                break
        self._planted[name] = [(after - 1, error) for after, error in left if after]
        for after, error in left:
            if not after:
                raise error


class FakeRunner:
    """A runner around another one, with faults. `max_in_flight` > 1: what is launched is computed when it is waited
    for, in order, as a device would that takes its time; copies are made at once."""

    def __init__(self, runner: Runner, max_in_flight: int = 1) -> None:
        self.inner, self.max_in_flight = runner, max_in_flight
        self.faults = Faults()
        self.on_wait: Callable[[int], None] = lambda num_tokens: None  # is told a batch's tokens
        self._queue: deque[_Deferred] = deque()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def launch(self, batch: Batch) -> _Deferred:
        self.faults.check("launch")
        deferred = _Deferred(self, batch)
        self._queue.append(deferred)
        if self.max_in_flight == 1:
            self.run_until(deferred)
        return deferred

    def run_until(self, deferred: _Deferred) -> None:
        while deferred in self._queue:
            self._queue.popleft().compute()

    def copy_block(self, source: int, destination: int) -> None:
        self.faults.check("copy_block")
        self.inner.copy_block(source, destination)

    def close(self) -> None:
        """The runner serves other tests."""


class _Deferred:
    def __init__(self, runner: FakeRunner, batch: Batch) -> None:
        self._runner, self._batch = runner, batch
        self._error: BaseException | None = None
        self._scores: Scores | None = None

    def compute(self) -> None:
        try:
            self._runner.faults.check("compute")
            self._scores = self._runner.inner.launch(self._batch).wait()
        except BaseException as error:
            self._error = error

    def wait(self) -> Scores:
        self._runner.run_until(self)
        self._runner.on_wait(len(self._batch.input_ids))
        self._runner.faults.check("wait")
        if self._error is not None:
            raise self._error
        assert self._scores is not None
        return self._scores


class PoisonedPool(BlockPool):
    """Blocks hold NaN when they are taken and when they are free: keys and values that are read unwritten show."""

    poison: Callable[[int], None] = staticmethod(lambda block: None)

    def _take(self) -> int:
        block = super()._take()
        self.poison(block)
        return block

    def _release(self, block: int) -> None:
        super()._release(block)
        if self._free and self._free[-1] == block:
            self.poison(block)


def engine_over(
    loaded: Engine,
    *,
    num_blocks: int | None = None,
    clock: Callable[[], float] | None = None,
    max_in_flight: int = 1,
    **limits: Any,
) -> Engine:
    """An engine with new books and other limits over a loaded one's runner, whose KV cache is poisoned."""
    old = loaded.core
    runner = FakeRunner(old.runner, max_in_flight)
    options = EngineConfig.from_options({"kv_reserve": 0.0, **limits})
    size = old.pool.block_size
    assert (num_blocks or 0) <= old.pool.num_blocks
    pool = PoisonedPool(
        num_blocks or old.pool.num_blocks, size, PrefixCache(size) if options.prefix_caching else None
    )
    cache = runner.kv_cache
    pool.poison = lambda block: cache.values.select(cache.block_axis, block).fill_(float("nan"))
    cache.values.fill_(float("nan"))
    core = EngineCore(
        old.runner.info.config,
        runner,
        Readout(loaded._heads),
        pool,
        options,
        min(options.max_model_len or old.max_model_len, old.max_model_len),
        old.fingerprint,
        **({} if clock is None else {"clock": clock}),
    )
    return Engine(core, loaded.chat, loaded._heads)


def faults(engine: Engine) -> Faults:
    """What is to go wrong in an engine made by `engine_over`."""
    return engine.core.runner.faults  # type: ignore[attr-defined]


def ids(count: int, seed: int = 0, vocab: int = 512) -> list[int]:
    return random.Random(seed).choices(range(vocab), k=count)


def bits(label: Label) -> tuple[Any, ...]:
    """All of a label but whose it is."""
    logits = label.risk_logits.tobytes() + label.category_logits.tobytes()
    return (label.role, label.position, label.token_id, label.risk, label.category, logits)


def by_stream(labels: list[Label]) -> dict[str, list[tuple[Any, ...]]]:
    """The bits of each stream's labels, in the order in which they came."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for label in labels:
        found.setdefault(label.stream_id, []).append(bits(label))
    return found


def state_of(num_tokens: int, name: str = "s", priority: int = 0) -> StreamState:
    """Books of a stream with pending tokens, of no engine."""
    policy = Policy.strict()
    state = StreamState(name, policy, [(-1, policy.start())], priority=priority)
    state.token_ids.extend(range(num_tokens))
    return state
