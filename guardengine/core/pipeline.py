"""Pipeline: steps on their way through the runner. Lays out batches, launches them, and reads labels off them.

A device that works by itself is given the next batch before the last one's labels are read, so that it need not
wait for the host. Changes no stream's books but `num_scheduled_tokens`; what was computed is for the caller to
record.

StepTimes: how many tokens a step may have to stay within a time, learned from the steps that ran.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from statistics import median
from typing import NamedTuple

from guardengine.core.layout import build_batch
from guardengine.core.readout import Reading, Readout
from guardengine.core.scheduler import Chunk, Scheduler
from guardengine.core.state import StreamState, Wanted
from guardengine.labels import Label
from guardengine.runners.runner import Launched, Runner, Scores

_REMEMBERED = 8  # steps of a size: enough that one hiccup is not the median
_LEAST = 16  # tokens that a step may always have: what a CPU or GPU computes at nearly the cost of one
# Steps: what larger ones took is forgotten bit by bit, or one hiccup would rule them out for ever.
_FORGET_EVERY = 64
_GROWTH = 2  # steps larger than any that ran grow by this much at a time


class StepTimes:
    """Seconds that recent steps took, by size: tokens rounded to a power of two."""

    def __init__(self) -> None:
        self._steps: dict[int, deque[tuple[int, float]]] = {}
        self._num_steps = 0

    def observe(self, num_tokens: int, seconds: float) -> None:
        steps = self._steps.setdefault(num_tokens.bit_length(), deque(maxlen=_REMEMBERED))
        steps.append((num_tokens, seconds))
        self._num_steps += 1
        if self._num_steps % _FORGET_EVERY == 0:
            for size in [size for size in self._steps if size > num_tokens.bit_length()]:
                self._steps[size].popleft()
                if not self._steps[size]:
                    del self._steps[size]

    def tokens_within(self, seconds: float) -> int:
        """The largest step that is expected to take no longer; at least 16 tokens.

        Between two sizes that ran time is taken to be linear in tokens, and beyond the largest as well, for at most
        twice its tokens: nothing is known of larger ones.
        """
        below: tuple[float, float] | None = None
        for size in sorted(self._steps):
            tokens = median(n for n, _ in self._steps[size])
            took = median(t for _, t in self._steps[size])
            if took > seconds:
                if below is None:
                    return max(_LEAST, int(tokens * seconds / took))
                share = (seconds - below[1]) / (took - below[1])
                return max(_LEAST, int(below[0] + share * (tokens - below[0])))
            below = (tokens, took)
        if below is None:
            return _LEAST
        tokens, took = below
        return max(_LEAST, int(tokens * min(_GROWTH, seconds / took if took else _GROWTH)))


class Finished(NamedTuple):
    """A chunk that was computed, with the labels that were wanted in it."""

    state: StreamState
    num_tokens: int
    labels: list[Label]


class _Step(NamedTuple):
    """A step in flight."""

    chunks: list[Chunk]
    wanted: list[list[tuple[int, Wanted]]]  # for each chunk: (row of the scores, what is wanted)
    launched: Launched
    began: float


class Pipeline:
    """The steps in flight, oldest first. `max_step_ms` bounds a step's tokens to what is expected to take so long."""

    def __init__(
        self,
        runner: Runner,
        readout: Readout,
        scheduler: Scheduler,
        block_size: int,
        max_step_ms: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.last_error: BaseException | None = None  # of the newest step; None when it went well
        self.suspects: list[StreamState] = []  # whose tokens were in the batch that failed
        self.last_end: float | None = None  # when the newest step that went well was done
        self._runner, self._readout, self._scheduler = runner, readout, scheduler
        self._block_size, self._max_step_ms, self._clock = block_size, max_step_ms, clock
        self._step_times = StepTimes()
        self._in_flight: deque[_Step] = deque()

    def __len__(self) -> int:
        return len(self._in_flight)

    def launch_waiting(self) -> None:
        """Launch what is waiting, as many steps as the runner wants. Raises what the runner raises, when no earlier
        step is in flight; with one in flight, the same chunks come up again after it."""
        while len(self._in_flight) < self._runner.max_in_flight:
            chunks = self._scheduler.schedule(self._token_budget())
            if not chunks:
                return
            try:
                batch, wanted = build_batch(chunks, self._block_size)
                began = self._clock()
                self._in_flight.append(_Step(chunks, wanted, self._runner.launch(batch), began))
            except BaseException as error:
                self._scheduler.requeue(chunks)
                self._blame(chunks, error)
                if self._in_flight and isinstance(error, Exception):
                    return
                raise

    def finish_oldest(self) -> list[Finished]:
        """Wait for the oldest step in flight and read its labels; nothing where there is none.

        When it raises, every step in flight is given up and nothing was computed.
        """
        if not self._in_flight:
            return []
        step = self._in_flight[0]
        try:
            finished = self._read(step, step.launched.wait())
        except BaseException as error:
            self._abandon()
            self._blame(step.chunks, error)
            raise
        self._in_flight.popleft()
        self._scheduler.finish(step.chunks)
        self.last_error, self.suspects = None, []
        now = self._clock()
        num_tokens = sum(chunk.num_tokens for chunk in step.chunks)
        began = step.began if self.last_end is None else max(step.began, self.last_end)
        self._step_times.observe(num_tokens, now - began)
        self.last_end = now
        return finished

    def _read(self, step: _Step, scores: Scores) -> list[Finished]:
        logits = scores.logits
        probs = self._readout.probabilities(logits) if scores.probs is None else scores.probs
        readings = [
            Reading(row, state.stream_id, role, position, state.token_ids[position])
            for (state, _, _), rows in zip(step.chunks, step.wanted, strict=True)
            for row, (position, role) in rows
        ]
        labels = iter(self._readout.labels(readings, logits, probs))
        return [
            Finished(state, num_tokens, list(islice(labels, len(rows))))
            for (state, _, num_tokens), rows in zip(step.chunks, step.wanted, strict=True)
        ]

    def _token_budget(self) -> int | None:
        return None if self._max_step_ms is None else self._step_times.tokens_within(self._max_step_ms / 1e3)

    def _abandon(self) -> None:
        while self._in_flight:
            step = self._in_flight.pop()
            try:
                with contextlib.suppress(Exception):
                    step.launched.wait()  # until it no longer touches the cache
            finally:
                self._scheduler.requeue(step.chunks)

    def _blame(self, chunks: list[Chunk], error: BaseException) -> None:
        self.last_error, self.suspects = error, [chunk.state for chunk in chunks]
