"""Rows: the rows of an input that are to be judged, in the groups in which an engine gets them. Knows no engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from guardengine.annotate.annotations import LONG_CHARS, Item
from guardengine.annotate.journal import Fault
from guardengine.annotate.jsonl_out import Columns, Source, first
from guardengine.annotate.layout import BadRow, Layout, Messages, conversation_of
from guardengine.annotate.rows import Row

# One call of the engine gets at most so many characters, about 16,000 tokens. That takes many steps, of which only the
# last is not full; the labels take some 20 MB.
_CALL_CHARS = 1 << 16
_MIN_CHARS = 64  # the size of what the template adds to a conversation


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The first `num_rows` rows of a source, without those that are done. Plain data, so that another process can
    iterate over it.

    Attributes:
        source: The input.
        layout: The columns that are judged.
        columns: The columns that are added.
        num_rows: How many rows of the input are annotated.
        window_rows: How many rows are sorted by length together.
        is_done: bool [num_rows], rows that an earlier run has judged.
    """

    source: Source
    layout: Layout
    columns: Columns
    num_rows: int
    window_rows: int
    is_done: npt.NDArray[np.bool_]

    def calls(self) -> Iterator[list[Item]]:
        """Iterate once over the input. For each window of rows: the rows that cannot be judged as one group, then the
        others in the groups of `calls`. The order is the same each time."""
        for window in self._windows():
            if faults := [item for item in window if isinstance(item[1], Fault)]:
                yield faults
            yield from calls([(row, found) for row, found in window if not isinstance(found, Fault)])

    def _windows(self) -> Iterator[list[Item]]:
        window: list[Item] = []
        for row in first(self.source.rows(self.layout.columns), self.num_rows):
            if self.is_done[row.number]:
                continue
            window.append((row.number, self._conversation(row)))
            if len(window) == self.window_rows:
                yield window
                window = []
        yield window

    def _conversation(self, row: Row) -> Messages | Fault:
        if row.fault is not None:
            return Fault(row.fault)
        for name in self.columns:
            if name in row.record:
                return Fault(f"has a column {name!r} already, which is to be added")
        try:
            return conversation_of(self.layout, row.record)
        except BadRow as error:
            return Fault(str(error))


def calls(items: list[tuple[int, Messages]]) -> Iterator[list[Item]]:
    """Conversations in the groups in which the engine gets them: of about equal lengths, and very long ones alone.
    Groups come in an order that looks random but is the same each time, so that the estimate of a progress bar is
    fair."""
    sizes = {
        number: _MIN_CHARS + sum(len(message["content"]) for message in messages)
        for number, messages in items
    }
    groups: list[list[Item]] = []
    room = 0
    for item in sorted(items, key=lambda item: sizes[item[0]]):
        size = sizes[item[0]]
        if not groups or size > room:
            groups.append([])
            room = _CALL_CHARS
        groups[-1].append(item)
        room = 0 if size > LONG_CHARS else room - size
    random.Random(len(groups)).shuffle(groups)
    yield from groups
