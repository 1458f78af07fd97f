"""One pair at one point: the engine and a peer taking turns, each alone on the machine while it computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from guardengine.bench.compare import WARM_UP_ROUNDS, ComparePoint
from guardengine.measuring.random_ids import random_ids

SETTLE_S = 0.05  # for threads that spin for a moment after their work to fall asleep
Say = Callable[[str], object]


class Worker(Protocol):
    """What is asked of a WorkerProcess."""

    name: str

    def request(self, command: str, **fields: Any) -> Any: ...

    def cpu_seconds(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds by round, for the engine and the peer; and the most of a core that the waiting side used."""

    engine_s: list[float]
    peer_s: list[float]
    idle_cores: float


def tokens_per_stream(point: ComparePoint, rounds: int) -> int:
    """The length a stream comes to. Prompts (context 0) are streams of their own in every round."""
    return point.k if not point.context_len else point.context_len + point.k * (rounds + WARM_UP_ROUNDS)


def take_turns(
    engine: Worker, peer: Worker, point: ComparePoint, rounds: int, *, vocab_size: int, seed: int, say: Say
) -> Turns:
    """Prepare both, then let both feed the same tokens, `rounds` times after a warm-up. Raises WorkerFailed.

    Who begins changes from round to round. Streams grow by the same tokens on both sides.
    """
    ids = random_ids(
        point.num_streams, point.context_len + point.k * (rounds + WARM_UP_ROUNDS), vocab_size, seed
    )
    prompts = [row[: point.context_len] for row in ids]
    pair = (engine, peer)
    for worker in pair:
        say(f"{worker.name}: prompts")
        worker.request("prepare", prompts=prompts)
    seconds: dict[str, list[float]] = {engine.name: [], peer.name: []}
    idle_cores = 0.0
    for turn, chunks in enumerate(_chunks(ids, point, rounds)):
        say(f"{engine.name} and {peer.name}: round {turn} of {rounds}")
        for worker, waiting in (pair, pair[::-1])[:: -1 if turn % 2 else 1]:
            if not point.context_len:
                worker.request("prepare", prompts=prompts)
            time.sleep(SETTLE_S)
            idle_from = waiting.cpu_seconds()
            taken = worker.request("advance", chunks=chunks)["seconds"]
            idle_cores = max(idle_cores, (waiting.cpu_seconds() - idle_from) / max(taken, 1e-9))
            seconds[worker.name].append(taken)
    engine_s, peer_s = (seconds[worker.name][WARM_UP_ROUNDS:] for worker in pair)
    return Turns(engine_s, peer_s, idle_cores)


def _chunks(ids: Sequence[Sequence[int]], point: ComparePoint, rounds: int) -> Iterator[list[Sequence[int]]]:
    for turn in range(rounds + WARM_UP_ROUNDS):
        first = point.context_len + point.k * turn
        yield [row[first : first + point.k] for row in ids]
