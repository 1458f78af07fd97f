"""Deadlines: until when which tokens of which streams should be computed."""

from __future__ import annotations

import heapq
import itertools
from typing import NamedTuple

from guardengine.core.state import StreamState

_SWEEP_AT = 64  # deadlines from which on those that were met are looked for


class _Deadline(NamedTuple):
    time: float
    number: int  # of equal times the first come
    state: StreamState
    start: int
    end: int

    @property
    def is_pending(self) -> bool:
        return not self.state.is_closed and self.state.num_seen_tokens < self.end


class Deadlines:
    """A queue of deadlines, the nearest first."""

    def __init__(self) -> None:
        self._queue: list[_Deadline] = []  # also holds some that were met
        self._sweep_at = _SWEEP_AT
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, state: StreamState, start: int, end: int, time: float) -> None:
        """The stream's tokens start..end-1 should be computed by `time`."""
        heapq.heappush(self._queue, _Deadline(time, next(self._numbers), state, start, end))
        if len(self._queue) > self._sweep_at:
            self._keep([d for d in self._queue if d.is_pending])
            self._sweep_at = max(_SWEEP_AT, 2 * len(self._queue))

    def inherit(self, branch: StreamState, parent: StreamState) -> None:
        """What is pending of the branch is due when it is of its parent."""
        for due in [d for d in self._queue if d.state is parent and d.is_pending]:
            self.add(branch, due.start, due.end, due.time)

    def drop(self, state: StreamState, num_tokens: int) -> None:
        """The stream has lost its tokens from `num_tokens` on; what is left of them is due as before."""
        if self._queue:
            kept = (d for d in self._queue if d.state is not state or d.start < num_tokens)
            self._keep([d._replace(end=min(d.end, num_tokens)) if d.state is state else d for d in kept])

    def pop_missed(self, now: float) -> StreamState | None:
        """A stream whose tokens are not computed by the time that they should have been."""
        while self._queue and self._queue[0].time <= now:
            due = heapq.heappop(self._queue)
            if due.is_pending:
                return due.state
        return None

    def _keep(self, queue: list[_Deadline]) -> None:
        heapq.heapify(queue)
        self._queue = queue
