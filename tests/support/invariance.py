"""What every mode of an engine promises: a stream's labels do not depend on how it is fed, nor on its company.

Each check takes `make`, which makes an engine of one mode with the options it is given, and a Plan: how much of what.
CHECKS has them all, so that a promise that is added here holds in every mode: tests/runners/test_invariance.py and
tests/gpu/test_invariance.py run them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from feeding import bits, feed, feed_at_once, ids, poison

from guardengine import Engine

MakeEngine = Callable[..., Engine]


@dataclass(frozen=True)
class Plan:
    """How much to try: an interpreter of kernels takes a second for what a CPU does in a millisecond.

    is_exact: the same bits; where not, logits that are 1e-4 apart at most.
    """

    prompt: int = 70
    response: int = 100
    chunks: tuple[int, ...] = (1, 4, 7, 16)
    budgets: tuple[int, ...] = (1, 13, 64, 100)
    block_sizes: tuple[int, ...] = (1, 3, 16, 64)  # of 16 on, keys lie in the cache as they are multiplied
    threads: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    crowd: int = 13
    crowd_block_sizes: tuple[int, ...] = (4, 16)
    is_exact: bool = True

    def text(self) -> tuple[list[int], list[int]]:
        return ids(self.prompt, 1), ids(self.response, 2)

    def same(self, found: np.ndarray, expected: np.ndarray, what: object) -> None:
        assert found.shape == expected.shape, what
        if self.is_exact:
            assert np.array_equal(found, expected), what
        else:
            assert np.abs(found.view(np.float32) - expected.view(np.float32)).max() <= 1e-4, what


def chunks_of_any_size(make: MakeEngine, plan: Plan) -> None:
    prompt, response = plan.text()
    with make() as engine:
        expected = feed_at_once(engine, prompt, response)
        for k in plan.chunks:
            plan.same(feed(engine, prompt, response, k), expected, k)
        engine.check_integrity()


def any_token_budget(make: MakeEngine, plan: Plan) -> None:
    prompt, response = plan.text()
    with make() as engine:
        expected = feed_at_once(engine, prompt, response)
    for budget in plan.budgets:
        with make(max_num_batched_tokens=budget) as other:
            plan.same(feed(other, prompt, response, plan.response), expected, budget)


def any_block_size(make: MakeEngine, plan: Plan) -> None:
    prompt, response = plan.text()
    with make() as engine:
        expected = feed_at_once(engine, prompt, response)
    for block_size in plan.block_sizes:
        with make(block_size=block_size) as other:
            plan.same(feed(other, prompt, response, 9), expected, block_size)


def any_number_of_threads(make: MakeEngine, plan: Plan) -> None:
    prompt, response = plan.text()
    with make() as engine:
        expected = feed_at_once(engine, prompt, response)
    for num_threads in plan.threads:
        with make(num_threads=num_threads) as other:
            assert other.stats()["num_threads"] == num_threads
            plan.same(feed(other, prompt, response, 50), expected, num_threads)


def alone_or_in_a_crowd(make: MakeEngine, plan: Plan) -> None:
    """Fed in random pieces with others that are longer and shorter, on a cache that is poisoned in between."""
    for block_size in plan.crowd_block_sizes:
        rng = random.Random(5)
        texts = [
            (ids(rng.randint(1, plan.prompt), 10 + i), ids(rng.randint(1, plan.response // 2), 50 + i))
            for i in range(plan.crowd)
        ]
        # Without the prefix cache: what it knows is poisoned in between.
        with make(block_size=block_size, prefix_caching=False) as engine:
            alone = [feed(engine, prompt, response, 1000) for prompt, response in texts]
            poison(engine)
            streams = [engine.open(token_ids=prompt) for prompt, _ in texts]
            left = [response for _, response in texts]
            while any(left):
                for index, stream in enumerate(streams):
                    if left[index] and rng.random() < 0.7:
                        k = rng.randint(1, 20)
                        stream.append(left[index][:k])
                        left[index] = left[index][k:]
                engine.step()
            engine.run()
            for index, (stream, own) in enumerate(zip(streams, alone, strict=True)):
                plan.same(bits(stream.labels), own, (block_size, index))
                stream.close()
            engine.check_integrity()


def fork_and_rollback(make: MakeEngine, plan: Plan) -> None:
    """Both in the middle of a block: what is copied and what is overwritten is each stream's own."""
    prompt, response = plan.text()
    shared, dropped = plan.response * 63 // 100, plan.response * 31 // 100
    left, right = ids(plan.response * 2 // 5, 7), ids(plan.response // 2, 8)
    for block_size in plan.crowd_block_sizes:
        with make(block_size=block_size) as engine, engine.open(token_ids=prompt) as stream:
            stream.append(response[:shared])
            engine.run()
            with stream.fork() as branch:
                stream.rollback(dropped)
                branch.append(left)
                stream.append(right)
                engine.run()
                for kept, own in (
                    (branch, response[:shared] + left),
                    (stream, response[: shared - dropped] + right),
                ):
                    plan.same(bits(kept.labels), feed(engine, prompt, own, 1000), block_size)
            engine.check_integrity()


CHECKS = (
    chunks_of_any_size,
    any_token_budget,
    any_block_size,
    any_number_of_threads,
    alone_or_in_a_crowd,
    fork_and_rollback,
)
