"""IdleStreams: streams with nothing to do, least recently active first. They are the first to lose their KV blocks,
and those that nobody comes back to can be closed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from guardengine.core.state import StreamState
from guardengine.errors import IntegrityError


class IdleStreams:
    """Idle streams in the order in which they went idle."""

    def __init__(self) -> None:
        self._since: OrderedDict[str, tuple[StreamState, float]] = OrderedDict()
        self._resident: OrderedDict[str, StreamState] = OrderedDict()  # those that hold blocks

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, stream: StreamState) -> bool:
        return stream.stream_id in self._since

    def add(self, stream: StreamState, now: float) -> None:
        """The stream has gone idle, or was active just now and is idle again."""
        self.discard(stream)
        self._since[stream.stream_id] = (stream, now)
        if stream.block_table:
            self._resident[stream.stream_id] = stream

    def discard(self, stream: StreamState) -> None:
        """The stream has something to do, or is gone."""
        self._since.pop(stream.stream_id, None)
        self._resident.pop(stream.stream_id, None)

    def num_blocks(self) -> int:
        """At most so many blocks would be freed by all of them; fewer where blocks are shared."""
        return sum(len(stream.block_table) for stream in self._resident.values())

    def take_resident(self) -> StreamState | None:
        """The least recently active one that holds blocks; it counts as holding none from now on."""
        return self._resident.popitem(last=False)[1] if self._resident else None

    def longest(self, before: float) -> StreamState | None:
        """The stream that has been idle for longest, if that was before the time `before`."""
        if not self._since:
            return None
        stream, since = next(iter(self._since.values()))
        return stream if since < before else None

    def check_integrity(self, streams: Iterable[StreamState]) -> None:
        """Raise IntegrityError unless exactly the idle ones of the open streams are here."""
        idle = {stream.stream_id for stream in streams if stream.is_idle}
        if idle != self._since.keys():
            raise IntegrityError(f"idle on the books: {sorted(self._since)}; in fact: {sorted(idle)}")
        holding = {name for name, (stream, _) in self._since.items() if stream.block_table}
        if holding != self._resident.keys():
            raise IntegrityError(f"idle with blocks: {sorted(self._resident)}; in fact: {sorted(holding)}")
