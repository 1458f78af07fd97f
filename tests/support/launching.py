"""What the tests of AsyncEngine share: an engine whose model can be held up or made to fail."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakes import bits

from guardengine import AsyncEngine, AsyncStream, Engine, Label, Policy
from guardengine.runners.batch import Batch

BLOCK = 16
BLOCK_BYTES = (
    3 * 2 * BLOCK * 2 * 32 * 4
)  # of the tiny checkpoint: layers, k and v, tokens, kv heads, dim, float32
POISON = 499


class Launches:
    """Stands in for a runner's `launch`. With two in flight batches are computed, and fail, when they are waited for,
    as those of a device that works by itself."""

    def __init__(self, engine: Engine, max_in_flight: int = 1) -> None:
        engine.core.runner.max_in_flight = self._max_in_flight = max_in_flight
        self._launch = engine.core.runner.launch
        self.may_run = threading.Event()
        self.may_run.set()
        self.entered = threading.Event()
        self.fails: Callable[[Batch], bool] = lambda batch: False
        self.num_computed = self.num_failed = 0
        engine.core.runner.launch = self

    def __call__(self, batch: Batch) -> Any:
        return _Deferred(self, batch) if self._max_in_flight > 1 else self.compute(batch)

    def compute(self, batch: Batch) -> Any:
        self.entered.set()
        if not self.may_run.wait(20):
            raise AssertionError("nobody let the model run")
        self.num_computed += 1
        if self.fails(batch):
            self.num_failed += 1
            raise RuntimeError("the model failed")
        return self._launch(batch)

    def hold(self) -> None:
        """Steps hang from now on."""
        self.entered.clear()
        self.may_run.clear()

    async def until_held(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 20)


@dataclass
class _Deferred:
    launches: Launches
    batch: Batch

    def wait(self) -> Any:
        return self.launches.compute(self.batch).wait()


def is_poisoned(batch: Batch) -> bool:
    return bool((batch.input_ids == POISON).any())


def sync_engine(folder: Path, **options: Any) -> Engine:
    options = {"kv_cache_bytes": 128 * BLOCK_BYTES, "max_model_len": 512, "num_threads": 1} | options
    return Engine.from_pretrained(folder, block_size=BLOCK, **options)


def with_engine(
    folder: Path,
    use: Callable[[AsyncEngine, Launches], Coroutine[Any, Any, None]],
    max_waiting: int = 4096,
    max_in_flight: int = 1,
    **options: Any,
) -> None:
    """Run `use` with an engine, and check that it leaves neither streams nor blocks behind."""

    async def main() -> None:
        sync = sync_engine(folder, **options)
        launches = Launches(sync, max_in_flight)
        async with AsyncEngine(sync, max_waiting=max_waiting) as engine:
            try:
                await asyncio.wait_for(use(engine, launches), 40)
            finally:
                launches.may_run.set()
            await engine.check_integrity()
            await settled(engine)
        pool = sync.core.pool
        pool.check_integrity([])
        assert pool.num_free == pool.num_blocks
        assert not engine.calls.unaccepted
        assert not engine.calls._futures

    asyncio.run(main())


async def failures(engine: AsyncEngine) -> dict[str, int]:
    return (await engine.stats())["failures"]


def lenient(**options: Any) -> Policy:
    """A policy that lets whatever random weights say pass."""
    return Policy.strict(debounce=1000, risk_thresholds={"Unsafe": 1.0, "Controversial": 1.0}, **options)


async def opened(engine: AsyncEngine, count: int, **options: Any) -> list[AsyncStream]:
    streams = [await engine.open(token_ids=[1, 2 + i], **options) for i in range(count)]
    for stream in streams:
        await stream.prompt()
    return streams


def ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(400), k=length)


async def settled(engine: AsyncEngine) -> None:
    """Wait until nothing is under way."""
    while await engine.calls.call(lambda: engine.engine.core.has_work) or engine.calls.unaccepted:
        await asyncio.sleep(0.001)


def same(labels: list[Label], others: list[Label]) -> bool:
    """Whether labels are the same to the last bit."""
    return [bits(label) for label in labels] == [bits(label) for label in others]
