"""A batch as one array of int32: all that a step on a GPU needs to know travels in a single copy.

Every step of a bucket of rows has the same places, so that a captured graph finds them; the plan comes last and is as
long as it must be.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from guardengine.runners.batch import Batch

Words = npt.NDArray[np.int32]

MAX_ROWS = 16384
NO_SLOT = -1  # a row that is not stored: padding

_SMALL_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
_ALIGNED = 4  # words: 16 bytes, the widest load
_NUM_LABELS = 0


def buckets(max_rows: int) -> tuple[int, ...]:
    """The numbers of rows that graphs are captured for, up to one that takes `max_rows`. A step takes the next larger
    one; from 64 on there are four to a doubling, so that less than a fifth of a step is padding."""
    found = [*_SMALL_BUCKETS]
    while found[-1] < max_rows:
        found.append(found[-1] + (1 << (found[-1].bit_length() - 1)) // 4)
    return tuple(found[: bisect_left(found, max_rows) + 1])


def places(num_rows: int) -> tuple[int, int, int, int, int]:
    """Where ids, positions, slots, labels and the plan of a step of `num_rows` rows, a bucket, begin."""
    column = -(-num_rows // _ALIGNED) * _ALIGNED
    ids, positions, slots, labels, plan = (_ALIGNED + column * index for index in range(5))
    return ids, positions, slots, labels, plan


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Views of a step's words on the device. Rows past the batch's are padding."""

    input_ids: Tensor  # [R] int32
    positions: Tensor  # [R] int32
    slot_mapping: Tensor  # [R] int32, NO_SLOT for padding
    label_index: Tensor  # [R] int32, of which the first `num_labels` count
    num_labels: Tensor  # [1] int32
    plan: Tensor  # int32

    @staticmethod
    def of(words: Tensor, num_rows: int) -> StepInputs:
        """The places of a step of `num_rows` rows, a bucket."""
        *starts, plan = places(num_rows)
        ids, positions, slots, labels = (words[start : start + num_rows] for start in starts)
        return StepInputs(ids, positions, slots, labels, words[_NUM_LABELS : _NUM_LABELS + 1], words[plan:])


def write_step(words: Words, num_rows: int, batch: Batch, plan: Words) -> int:
    """Write a batch as a step. Rows past the batch's are padding, which stores nothing in the cache.

    Args:
        words: Written to, from the front.
        num_rows: R, the step's bucket.
        batch: Of at most R rows.
        plan: Attention's, of this batch.

    Returns:
        How many words are in use.
    """
    *starts, plan_start = places(num_rows)
    words[_NUM_LABELS] = len(batch.label_index)
    columns = (
        (batch.input_ids, 0),
        (batch.rows.positions, 0),
        (batch.slot_mapping, NO_SLOT),
        (batch.label_index, 0),
    )
    for start, (values, filler) in zip(starts, columns, strict=True):
        count = len(values)
        words[start : start + count] = values.numpy()
        words[start + count : start + num_rows] = filler
    words[plan_start : plan_start + len(plan)] = plan
    return plan_start + len(plan)
