"""A batch as one array of int32: what a step on a GPU is told travels in a single copy.

Small steps have fixed places, so that a captured graph finds them; the plan comes last and is as long as it must be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from guardengine.batch import Batch, Rows

Words = npt.NDArray[np.int32]
# (rows, split) -> attention's plan of a batch's rows
Plan = Callable[[Rows], Words]

SMALL_ROWS = 64
# Rows that a graph is captured for; a step takes the next larger one.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
NO_SLOT = -1  # a row that is not stored: padding

_ALIGNED = 4  # words: 16 bytes, the widest load
_NUM_LABELS = 0
_IDS, _POSITIONS, _SLOTS, _LABELS, PLAN = (_ALIGNED + SMALL_ROWS * column for column in range(5))


@dataclass(frozen=True, slots=True)
class SmallStep:
    """Views of a small step's words on the device. Rows past the batch's are padding."""

    input_ids: Tensor  # [R] int32
    positions: Tensor  # [R] int32
    slot_mapping: Tensor  # [R] int32, NO_SLOT for padding
    label_index: Tensor  # [R] int32, of which the first `num_labels` count
    num_labels: Tensor  # [1] int32
    plan: Tensor  # int32

    @staticmethod
    def of(words: Tensor, num_rows: int) -> SmallStep:
        """The places of a step of `num_rows` rows, a bucket."""
        ids, positions, slots, labels = (
            words[start : start + num_rows] for start in (_IDS, _POSITIONS, _SLOTS, _LABELS)
        )
        return SmallStep(ids, positions, slots, labels, words[_NUM_LABELS : _NUM_LABELS + 1], words[PLAN:])


@dataclass(frozen=True, slots=True)
class LargeStep:
    """A batch whose numbers for the device lie in one array of words."""

    num_words: int
    places: tuple[
        tuple[int, int], ...
    ]  # (start, count) of: ids, positions, slots, labels, label positions, plans

    def batch(self, words: Tensor, batch: Batch) -> tuple[Batch, tuple[Tensor, Tensor]]:
        """The batch, its numbers on the device where operators read them, and the plans of its rows and of the
        labelled ones. Where rows begin and which blocks they have is in the plans: that stays in the host's memory.
        """
        ids, positions, slots, labels, label_positions, plan, label_plan = (
            words[start : start + count] for start, count in self.places
        )
        moved = Batch(
            ids,
            Rows(positions, batch.rows.cu_seqlens_q),
            slots,
            batch.block_tables,
            labels,
            Rows(label_positions, batch.label_rows.cu_seqlens_q),
        )
        return moved, (plan, label_plan)


def bucket(num_rows: int) -> int:
    """The rows of the graph that a small step of `num_rows` rows runs on."""
    return next(rows for rows in BUCKETS if rows >= num_rows)


def write_small(words: Words, batch: Batch, plan: Words) -> int:
    """Write a small step; returns the words in use. Padding up to the bucket writes nothing into the cache."""
    num_rows, num_labels = len(batch.input_ids), len(batch.label_index)
    padded = bucket(num_rows)
    words[_NUM_LABELS] = num_labels
    for start, values, filler in (
        (_IDS, batch.input_ids, 0),
        (_POSITIONS, batch.rows.positions, 0),
        (_SLOTS, batch.slot_mapping, NO_SLOT),
        (_LABELS, batch.label_index, 0),
    ):
        count = len(values)
        words[start : start + count] = values.numpy()
        words[start + count : start + padded] = filler
    words[PLAN : PLAN + len(plan)] = plan
    return PLAN + len(plan)


def lay_out_large(batch: Batch, plan: Words, label_plan: Words) -> tuple[LargeStep, list[Words]]:
    """Places for a step of any size, and what to write there."""
    parts = [
        tensor.numpy()
        for tensor in (
            batch.input_ids,
            batch.rows.positions,
            batch.slot_mapping,
            batch.label_index,
            batch.label_rows.positions,
        )
    ]
    parts += [plan, label_plan]
    places, start = [], 0
    for part in parts:
        places.append((start, len(part)))
        start += -(-len(part) // _ALIGNED) * _ALIGNED
    return LargeStep(start, tuple(places)), parts


def write_large(words: Words, step: LargeStep, parts: list[Words]) -> None:
    for (start, count), part in zip(step.places, parts, strict=True):
        words[start : start + count] = part
