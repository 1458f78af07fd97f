"""HeldItems: what an LLM has said, held until it may be shown. The one queue behind everything that holds back: text,
ids, a host's chunks, labels that are to be printed. Does no I/O, and knows no guard and no engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
S = TypeVar("S", str, list[int])
# An item and a part of its length, more than none and less than all -> the two parts of the item; None: it is not cut.
Split = Callable[[T, int], tuple[T, T] | None]


class HeldItems(Generic[T]):
    """Items in their order, each with a length, in any unit that what is cleared is counted in: characters or tokens.

    An example with numbers: after `add("Hello", 5)` and `add(" you", 4)`, `take(7)` gives ["Hello", " y"] where the
    split cuts strings, ["Hello"] where there is none; `take(9)` gives the rest.

    Args:
        split: cuts an item that is cleared in part; None: items are taken whole.
        start: how much was there before the first item, in the same unit, of what `take` counts.
    """

    def __init__(self, split: Split[T] | None = None, start: int = 0) -> None:
        self._split = split
        self._items: deque[tuple[T, int]] = deque()
        self._num_taken = start

    def add(self, item: T, length: int) -> None:
        """Hold one more. An item of length 0 is taken after all that is before it."""
        self._items.append((item, length))

    def take(self, end: int) -> list[T]:
        """Take what is cleared.

        Args:
            end: how much of all that was added is cleared, `start` included.

        Returns:
            The items, or parts of them, that end by then and were not taken before.
        """
        return [item for item, _ in self._taken(end)]

    def rest(self) -> list[T]:
        """Take all that is left."""
        items = [item for item, _ in self._items]
        self._num_taken += sum(length for _, length in self._items)
        self._items.clear()
        return items

    def cut(self, end: int) -> None:
        """Forget what lies beyond `end`, which the LLM is to say in another way."""
        num_taken = self._num_taken
        self._items = self._taken(end)
        self._num_taken = num_taken

    def _taken(self, end: int) -> deque[tuple[T, int]]:
        taken: deque[tuple[T, int]] = deque()
        while self._items:
            item, length = self._items.popleft()
            room = end - self._num_taken
            if length > room:
                parts = self._split(item, room) if self._split is not None and room > 0 else None
                if parts is None:
                    self._items.appendleft((item, length))
                    break
                self._items.appendleft((parts[1], length - room))
                item, length = parts[0], room
            self._num_taken += length
            taken.append((item, length))
        return taken


def cut_sequence(item: S, length: int) -> tuple[S, S]:
    """A `Split` of texts and of lists of ids."""
    return item[:length], item[length:]
