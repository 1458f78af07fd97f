"""Which streams run in the next step, and how many tokens of each. Knows counts only; no torch, no blocks.

There is no prefill and no decode: every stream has tokens of which some are computed, and a step moves
`num_computed_tokens` towards `num_tokens`. A prompt is a stream with many pending tokens, a live reply one
with few.

A stream that starts to wait gets a rank, the smaller the sooner:

    rank = steps so far + LONG_WAIT (if more than SHORT tokens are pending) - PRIORITY_STEPS * priority

and keeps it until it was served. So a reply's few tokens go before a long prompt's next chunk, and nobody
starves: streams that come later get larger ranks as steps go by, and pass a waiting one for at most
LONG_WAIT + 2 * MAX_PRIORITY * PRIORITY_STEPS steps.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from guardengine.core.state import StreamState
from guardengine.errors import IntegrityError

SHORT = 16  # tokens: a burst of an LLM's
LONG_WAIT = 8  # steps
MAX_PRIORITY = 3
PRIORITY_STEPS = 16


class Chunk(NamedTuple):
    """Tokens start..start+num_tokens-1 of one stream."""

    state: StreamState
    start: int
    num_tokens: int


class _Place(NamedTuple):
    """A place in the queue; of equal ranks the first come."""

    rank: int
    number: int
    state: StreamState


class Scheduler:
    """A queue of streams with pending tokens, and the streams that a running step is at work on."""

    def __init__(self, token_budget: int) -> None:
        self.token_budget = token_budget
        self._num_steps = 0
        self._numbers = itertools.count()
        self._heap: list[_Place] = []  # also holds places that were given up
        self._waiting: dict[str, _Place] = {}
        self._running: dict[str, list[_Place]] = {}  # the places that chunks in flight had, oldest first
        self._parked: dict[str, _Place] = {}  # places of streams that are left out

    def __len__(self) -> int:
        return len(self._waiting.keys() | self._running.keys())

    def add(self, state: StreamState) -> None:
        """Queue a stream that has unscheduled tokens; one that waits already, or is parked, keeps its place."""
        if place := self._parked.pop(state.stream_id, None):
            self._push(place)
        elif state.stream_id not in self._waiting:
            wait = LONG_WAIT if state.num_unscheduled_tokens > SHORT else 0
            rank = self._num_steps + wait - PRIORITY_STEPS * state.priority
            self._push(_Place(rank, next(self._numbers), state))

    def update(self, state: StreamState) -> None:
        """Queue the stream or take it off the queue, as it has unscheduled tokens or not."""
        if state.num_unscheduled_tokens:
            self.add(state)
        else:
            self._waiting.pop(state.stream_id, None)
            self._parked.pop(state.stream_id, None)

    def discard(self, state: StreamState) -> None:
        """Take a stream off the queue."""
        for places in (self._waiting, self._running, self._parked):
            places.pop(state.stream_id, None)

    def park(self, state: StreamState) -> None:
        """Leave a stream that waits out of all steps, until it is added again: when more is appended, for one."""
        self._parked[state.stream_id] = self._waiting.pop(state.stream_id)

    @contextmanager
    def only(self, states: Iterable[StreamState]) -> Iterator[None]:
        """Leave all streams but these out of the steps that run within this context."""
        wanted = {state.stream_id for state in states}
        others = [place.state for name, place in self._waiting.items() if name not in wanted]
        for state in others:
            self.park(state)
        try:
            yield
        finally:
            for state in others:
                if state.stream_id in self._parked:  # it was not closed
                    self.add(state)

    def schedule(self, token_budget: int | None = None) -> list[Chunk]:
        """Choose the next step's chunks, at most `token_budget` tokens in all, and count them as scheduled.

        A chunk of a stream takes at most half of the budget while others wait. The chunks run until `finish` or
        `requeue`; what is left of a stream waits for a new place.
        """
        budget = self.token_budget if token_budget is None else min(token_budget, self.token_budget)
        largest = budget if len(self._waiting) == 1 else max(1, budget // 2)
        chosen: list[
            tuple[_Place, int, int]
        ] = []  # with its tokens of this step, and those that it would leave
        while budget and self._heap:
            place = heapq.heappop(self._heap)
            state = place.state
            if self._waiting.get(state.stream_id) is not place:
                continue
            del self._waiting[state.stream_id]
            num_unscheduled = state.num_unscheduled_tokens
            num_tokens = min(num_unscheduled, budget, largest)
            budget -= num_tokens
            chosen.append((place, num_tokens, num_unscheduled - num_tokens))
        chunks: list[Chunk] = []
        unfinished: list[StreamState] = []
        for place, num_tokens, num_left in chosen:
            state = place.state
            if num_left:
                more = min(num_left, budget)  # nobody else wants it
                budget -= more
                num_tokens += more
                if num_left > more:
                    unfinished.append(state)
            chunks.append(Chunk(state, state.num_scheduled_tokens, num_tokens))
            state.num_scheduled_tokens += num_tokens
            self._running.setdefault(state.stream_id, []).append(place)
        self._num_steps += bool(chunks)
        for state in unfinished:
            self.add(state)
        return chunks

    def finish(self, chunks: list[Chunk]) -> None:
        """The oldest chunks in flight were computed."""
        for state, _, _ in chunks:
            self._pop_running(state, 0)

    def requeue(self, chunks: list[Chunk]) -> None:
        """The newest chunks in flight were not computed: their streams wait again, at the places they had."""
        for state, start, _ in chunks:
            state.num_scheduled_tokens = start
            self._push(self._pop_running(state, -1))

    def _pop_running(self, state: StreamState, index: int) -> _Place:
        places = self._running[state.stream_id]
        place = places.pop(index)
        if not places:
            del self._running[state.stream_id]
        return place

    def _push(self, place: _Place) -> None:
        self._waiting[place.state.stream_id] = place
        heapq.heappush(self._heap, place)

    def check_integrity(self, states: Iterable[StreamState]) -> None:
        """Raise IntegrityError unless exactly the open streams with unscheduled tokens wait or are parked."""
        unscheduled = {state.stream_id for state in states if state.num_unscheduled_tokens}
        queued = [*self._waiting, *self._parked]
        if unscheduled != set(queued) or len(queued) != len(unscheduled):
            raise IntegrityError(f"queued: {sorted(queued)}; pending: {sorted(unscheduled)}")
        for stream_id, place in self._waiting.items():
            if place not in self._heap:
                raise IntegrityError(f"{stream_id} waits without a place in the heap")
