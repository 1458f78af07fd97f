"""The engine and transformers side by side: the same tokens, taking turns in one run.

In one measurement each contender advances all streams by the next k tokens:

    engine             one batched step
    hf_incremental_*   a DynamicCache for each stream, stepped in turn (sdpa or eager attention)
    hf_released        like the released code: the whole conversation again for every token, no cache
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from guardengine.bench.hf import AttnImplementation, GuardOutput, HFGuard, IncrementalStream
from guardengine.engine.engine import Engine
from guardengine.engine.stream import Stream
from guardengine.errors import ConfigError, IntegrityError
from guardengine.measuring.random_ids import random_ids

ENGINE, RELEASED, INCREMENTAL = "engine", "hf_released", "hf_incremental"
WARM_UP_ROUNDS = 1
Progress = Callable[[int], object]
Chunks = Sequence[Sequence[int]]  # the next tokens of each stream


class ComparePoint(NamedTuple):
    """A measured setting: the number of streams, the tokens before the measurement, and the tokens in it."""

    num_streams: int
    context_len: int
    k: int = 1


def compare_points(context_lens: Sequence[int], stream_counts: Sequence[int], k: int) -> list[ComparePoint]:
    """One stream at every context; then more streams at 256 tokens or, without that context, at the shortest."""
    for context_len in context_lens:
        if context_len < 1:
            raise ConfigError(f"context {context_len}: give at least 1 token")
    shared = 256 if 256 in context_lens else min(context_lens)
    points = [ComparePoint(1, context_len, k) for context_len in context_lens]
    return points + [ComparePoint(count, shared, k) for count in stream_counts if count > 1]


def tokens_per_stream(point: ComparePoint, rounds: int) -> int:
    """The length of one stream at the end of this point."""
    return point.context_len + point.k * (rounds + WARM_UP_ROUNDS)


def num_measurements(points: Sequence[ComparePoint], rounds: int) -> int:
    """The number of timed measurements and prompts, for a progress bar."""
    return sum((rounds + WARM_UP_ROUNDS) * (3 + (p.num_streams == 1)) + 2 * p.num_streams for p in points)


class _Ours:
    name = ENGINE

    def __init__(self, engine: Engine, prompts: Chunks, progress: Progress) -> None:
        self.engine = engine
        self.streams: list[Stream] = [engine.open(token_ids=prompt, role="user") for prompt in prompts]
        engine.run()
        progress(len(prompts))

    def advance(self, chunks: Chunks) -> float:
        start = time.perf_counter()
        for stream, ids in zip(self.streams, chunks, strict=True):
            stream.append(ids)
        labels = self.engine.run()
        seconds = time.perf_counter() - start
        if len(labels) != sum(map(len, chunks)):
            raise IntegrityError(f"{len(labels)} labels came for {sum(map(len, chunks))} tokens")
        self.last_logits = labels[-1].risk_logits
        return seconds

    def close(self) -> None:
        for stream in self.streams:
            stream.close()


class _Incremental:
    def __init__(self, guard: HFGuard, attn: AttnImplementation, streams: list[IncrementalStream]) -> None:
        self.name = f"{INCREMENTAL}_{attn}"
        self.guard, self.attn, self.streams = guard, attn, streams

    def advance(self, chunks: Chunks) -> float:
        self.guard.set_attn_implementation(self.attn)
        start = time.perf_counter()
        for stream, ids in zip(self.streams, chunks, strict=True):
            out = stream.append(ids)
            _label(out)
        seconds = time.perf_counter() - start
        self.last_logits = out.risk_level_logits[0, -1].float().numpy()
        return seconds

    def close(self) -> None:
        self.streams.clear()


class _Released:
    name = RELEASED

    def __init__(self, guard: HFGuard, prompts: Chunks) -> None:
        self.guard, self.fed = guard, [list(prompt) for prompt in prompts]

    def advance(self, chunks: Chunks) -> float:
        self.guard.set_attn_implementation("sdpa")
        start = time.perf_counter()
        for fed, ids in zip(self.fed, chunks, strict=True):
            for token in ids:  # it takes one token a call
                fed.append(token)
                self.guard.released_call(torch.tensor(fed), "assistant")
        return time.perf_counter() - start

    def close(self) -> None:
        self.fed.clear()


@dataclass(slots=True)
class Comparison:
    """The contenders, and how to measure them. `run` measures one point."""

    engine: Engine
    guard: HFGuard
    vocab_size: int
    seed: int
    rounds: int
    progress: Progress

    def run(self, point: ComparePoint) -> list[dict[str, Any]]:
        """One row for each contender. The contender that begins changes from round to round.

        A measurement lasts from when the tokens of all streams are there until all of their labels are there. Prompts
        and the first round are not measured.
        """
        context_len, k = point.context_len, point.k
        ids = random_ids(point.num_streams, tokens_per_stream(point, self.rounds), self.vocab_size, self.seed)
        prompts = [row[:context_len] for row in ids]
        ours = _Ours(self.engine, prompts, self.progress)
        try:
            contenders = [ours, *self._transformers(prompts)]
            seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
            difference = 0.0
            for turn in range(self.rounds + WARM_UP_ROUNDS):
                first = context_len + k * turn
                chunks = [row[first : first + k] for row in ids]
                shift = turn % len(contenders)
                for contender in contenders[shift:] + contenders[:shift]:
                    seconds[contender.name].append(contender.advance(chunks))
                    self.progress(1)
                for contender in contenders[1:3]:
                    gap = np.abs(contender.last_logits - ours.last_logits).max()  # type: ignore[union-attr]
                    difference = max(difference, float(gap))
        finally:
            ours.close()
        timed = {name: values[WARM_UP_ROUNDS:] for name, values in seconds.items()}
        reference = float(np.median(timed[ENGINE]))
        return [
            {
                **point._asdict(),
                "contender": name,
                "rounds": self.rounds,
                "ms": {f"p{p}": 1e3 * float(np.percentile(values, p)) for p in (20, 50, 80)},
                "ms_per_token": 1e3 * float(np.median(values)) / (point.num_streams * k),
                "tokens_per_s": point.num_streams * k / float(np.median(values)),
                "engine_is_faster_by": float(np.median(values)) / reference,
                "largest_logit_difference": difference if name == ENGINE else None,
            }
            for name, values in timed.items()
        ]

    def _transformers(self, prompts: Chunks) -> list[_Incremental | _Released]:
        self.guard.set_attn_implementation("sdpa")
        streams = []
        for prompt in prompts:
            streams.append(IncrementalStream(self.guard))
            streams[-1].append(prompt, logits_to_keep=1)
            self.progress(1)
        copies = [stream.fork() for stream in streams]  # so that prompts are not computed twice
        found: list[_Incremental | _Released] = [
            _Incremental(self.guard, "sdpa", streams),
            _Incremental(self.guard, "eager", copies),
        ]
        # The released code has one stream at a time; the time of several would be the sum.
        return found + ([_Released(self.guard, prompts)] if len(prompts) == 1 else [])


def _label(out: GuardOutput) -> None:
    """The work of a user of the logits: probabilities and the likeliest classes, as Python numbers."""
    for logits in (out.risk_level_logits, out.category_logits):
        prob, index = logits[0].softmax(-1).max(-1)
        prob.tolist()
        index.tolist()
