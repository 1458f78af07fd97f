"""HeldItems: a host's items, held until their text may be shown. Does no I/O and knows no guard."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
# An item and a number of characters of its text, more than none and fewer than all -> the two parts.
Split = Callable[[T, int], tuple[T, T] | None]


class HeldItems(Generic[T]):
    """Items in their order. text: of one, None where it has none. split: see `Split`; None: items are not cut."""

    def __init__(self, text: Callable[[T], str | None], split: Split[T] | None = None) -> None:
        self._text, self._split = text, split
        self._items: deque[tuple[T, int]] = deque()  # and how many characters it has
        self._num_taken = 0  # characters

    def add(self, items: Iterable[T]) -> str:
        """Take items in; returns their text, which is to be judged."""
        added = ""
        for item in items:
            text = self._text(item) or ""
            self._items.append((item, len(text)))
            added += text
        return added

    def take(self, num_chars: int) -> list[T]:
        """The items, or parts of them, whose text ends within the first `num_chars` characters of all that were added,
        without those that were taken."""
        taken = []
        while self._items:
            item, length = self._items[0]
            room = num_chars - self._num_taken
            if length <= room or not length:
                self._items.popleft()
                taken.append(item)
                self._num_taken += length
                continue
            parts = self._split(item, room) if self._split is not None and room > 0 else None
            if parts is not None:
                first, rest = parts
                taken.append(first)
                self._items[0] = (rest, length - room)
                self._num_taken = num_chars
            break
        return taken

    def rest(self) -> list[T]:
        """All that were not taken."""
        items = [item for item, _ in self._items]
        self._items.clear()
        return items
