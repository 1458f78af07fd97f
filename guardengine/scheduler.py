"""Which streams run in the next step, and how many tokens of each. Knows counts only; no torch, no blocks.

There is no prefill and no decode: every stream has tokens of which some are computed, and a step moves
`num_computed_tokens` towards `num_tokens`. A prompt is a stream with many pending tokens, a live reply one
with few.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from guardengine.errors import IntegrityError
from guardengine.state import StreamState


class Chunk(NamedTuple):
    """The next `num_tokens` uncomputed tokens of one stream."""

    stream: StreamState
    num_tokens: int


class Scheduler:
    """A queue of streams with pending tokens, served first come, first served under a token budget.

    A stream that a step leaves unfinished goes to the back, so a long prompt takes turns with the others and
    nobody waits longer than one round.
    """

    def __init__(self, token_budget: int) -> None:
        self.token_budget = token_budget
        self._queue: OrderedDict[str, StreamState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def num_pending_tokens(self) -> int:
        return sum(stream.num_pending_tokens for stream in self._queue.values())

    def add(self, stream: StreamState) -> None:
        """Queue a stream that has pending tokens; one that waits already keeps its place."""
        self._queue.setdefault(stream.stream_id, stream)

    def discard(self, stream: StreamState) -> None:
        self._queue.pop(stream.stream_id, None)

    def schedule(self) -> list[Chunk]:
        """Choose the next step's chunks, without changing the queue: at most `token_budget` tokens in all."""
        chunks: list[Chunk] = []
        budget = self.token_budget
        for stream in self._queue.values():
            if not budget:
                break
            chunks.append(Chunk(stream, min(stream.num_pending_tokens, budget)))
            budget -= chunks[-1].num_tokens
        return chunks

    def finish(self, chunks: list[Chunk]) -> None:
        """Take computed chunks off the queue; streams with tokens left go to its back."""
        for stream, _ in chunks:
            if stream.num_pending_tokens:
                self._queue.move_to_end(stream.stream_id)
            else:
                del self._queue[stream.stream_id]

    def check_integrity(self, streams: Iterable[StreamState]) -> None:
        """Raise IntegrityError unless exactly the open streams with pending tokens are queued."""
        pending = {stream.stream_id for stream in streams if stream.num_pending_tokens}
        if pending != set(self._queue):
            raise IntegrityError(f"queued: {sorted(self._queue)}; pending: {sorted(pending)}")
