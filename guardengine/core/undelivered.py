"""Undelivered: labels that no `step` has returned yet. They come with the next one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from guardengine.core.state import StreamState
from guardengine.labels import Label


class Undelivered:
    """Labels in the order in which they are to be returned."""

    def __init__(self) -> None:
        self._labels: list[Label] = []

    def __len__(self) -> int:
        return len(self._labels)

    def __iter__(self) -> Iterator[Label]:
        return iter(self._labels)

    def add(self, labels: list[Label]) -> None:
        """These come after those that are here."""
        self._labels += labels

    def put_back(self, labels: list[Label]) -> None:
        """These come before those that are here."""
        self._labels = labels + self._labels

    def pop_all(self) -> list[Label]:
        """All of them, which then count as returned."""
        labels, self._labels = self._labels, []
        return labels

    def num_of(self, state: StreamState) -> int:
        """How many are a stream's: its newest labels."""
        return sum(label.stream_id == state.stream_id for label in self._labels)

    def drop(self, state: StreamState, num_tokens: int = 0) -> None:
        """Drop a stream's labels from position `num_tokens` on."""
        name = state.stream_id
        self._labels = [x for x in self._labels if x.stream_id != name or x.position < num_tokens]

    def drop_all_of(self, states: Iterable[StreamState]) -> None:
        """Drop all labels of these streams, whose books have them."""
        names = {state.stream_id for state in states}
        self._labels = [label for label in self._labels if label.stream_id not in names]
