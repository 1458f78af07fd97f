"""Deadlines: until when which tokens of which streams should be computed."""

from __future__ import annotations

import heapq
import itertools
from typing import NamedTuple

from guardengine.state import StreamState


class _Deadline(NamedTuple):
    time: float
    number: int  # of equal times the first come
    stream: StreamState
    end: int


class Deadlines:
    """A queue of deadlines, the nearest first."""

    def __init__(self) -> None:
        self._queue: list[_Deadline] = []
        self._numbers = itertools.count()

    def add(self, stream: StreamState, end: int, time: float) -> None:
        """The stream's tokens before position `end` should be computed by `time`."""
        heapq.heappush(self._queue, _Deadline(time, next(self._numbers), stream, end))

    def drop(self, stream: StreamState, num_tokens: int) -> None:
        """The stream has lost its tokens from `num_tokens` on."""
        if self._queue:
            self._queue = [d for d in self._queue if d.stream is not stream or d.end <= num_tokens]
            heapq.heapify(self._queue)

    def take_missed(self, now: float) -> StreamState | None:
        """A stream whose tokens are not computed by the time that they should have been."""
        while self._queue and self._queue[0].time <= now:
            due = heapq.heappop(self._queue)
            if not due.stream.is_closed and due.stream.num_seen_tokens < due.end:
                return due.stream
        return None
