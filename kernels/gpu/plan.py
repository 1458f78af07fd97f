"""plan_attention(): how a ragged batch of rows is cut into the work items of the attention kernel.

Pure numpy on the host, before every step. The plan is one int32 array, so that it travels in the step's only copy:

    [0, HEADER_SIZE)     number of items, scratch rows needed, size of the array, zeros
    items                ITEM_FIELDS numbers each, named below; longest first, so that no program is left with one
    block ids            of every stream, one after another, only as far as its rows look

A tile is up to `tile_rows` rows of one stream; keys are cut at every multiple of SEGMENT, counted from position 0.
With `split` an item is a tile and one segment, otherwise a tile and all of its segments.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SEGMENT = 256  # keys; part of the result's bits: sums over a segment are merged in ascending order

HEADER_SIZE = 8
NUM_ITEMS, NUM_SCRATCH_ROWS, PLAN_SIZE = range(3)

ITEM_FIELDS = 8
(
    FIRST_ROW,  # of the tile
    NUM_ROWS,
    FIRST_KEY,  # position, a multiple of SEGMENT
    END_KEY,  # position after the last key: the end of the segment, or of what the tile's last row sees
    TABLE_OFFSET,  # index into the plan of the block id that holds FIRST_KEY
    SEGMENT_INDEX,
    NUM_SEGMENTS,  # items of the tile: 1 writes its rows at once, of more the last one to finish merges all
    SCRATCH_ROW,  # of the tile's first row and segment; names the tile's counter too
) = range(ITEM_FIELDS)

Array = npt.NDArray[np.integer]


def plan_attention(
    cu_seqlens_q: Array,
    positions: Array,
    block_tables: Array,
    *,
    block_size: int,
    tile_rows: int,
    split: bool,
) -> npt.NDArray[np.int32]:
    """Cut a ragged batch into work items.

    Shapes:   cu_seqlens_q [B+1]; positions [T]; block_tables [B, M], any integers -> [size] int32.
    Requires: rows of a stream in ascending order of position; block_tables as far as the last of them. Rows past
              cu_seqlens_q[-1] (padding) get no item.
    """
    starts, counts = cu_seqlens_q[:-1], np.diff(cu_seqlens_q)
    num_streams, max_blocks = block_tables.shape
    live = counts > 0
    lasts = np.where(live, positions[np.where(live, starts + counts - 1, 0)], -1) if len(positions) else -live
    used_blocks = lasts // block_size + 1
    tables = block_tables[np.arange(max_blocks) < used_blocks[:, None]]
    table_starts = np.cumsum(used_blocks) - used_blocks

    tile_counts = -(-counts // tile_rows)
    stream = np.repeat(np.arange(num_streams), tile_counts)
    first_row = starts[stream] + _counted(tile_counts) * tile_rows
    num_rows = np.minimum(tile_rows, starts[stream] + counts[stream] - first_row)
    end_key = positions[first_row + num_rows - 1] + 1
    num_segments = -(-end_key // SEGMENT) if split else np.ones_like(end_key)

    # Tiles of one segment need no scratch; SCRATCH_ROW stays inside of it all the same.
    scratch_rows = np.where(num_segments > 1, num_rows * num_segments, 0)
    scratch_row = np.cumsum(scratch_rows) - scratch_rows
    columns = np.empty((ITEM_FIELDS, num_segments.sum()), dtype=np.int32)
    segment = _counted(num_segments)
    first_key = segment * SEGMENT
    tile = np.repeat(np.arange(len(stream)), num_segments)
    columns[FIRST_ROW] = first_row[tile]
    columns[NUM_ROWS] = num_rows[tile]
    columns[FIRST_KEY] = first_key
    columns[END_KEY] = np.minimum(end_key[tile], first_key + SEGMENT) if split else end_key
    columns[TABLE_OFFSET] = (
        HEADER_SIZE + columns.size + table_starts[stream][tile] + columns[FIRST_KEY] // block_size
    )
    columns[SEGMENT_INDEX] = segment
    columns[NUM_SEGMENTS] = num_segments[tile]
    columns[SCRATCH_ROW] = scratch_row[tile]
    longest_first = np.argsort(columns[FIRST_KEY] - columns[END_KEY], kind="stable")

    plan = np.zeros(HEADER_SIZE + columns.size + len(tables), dtype=np.int32)
    plan[NUM_ITEMS] = columns.shape[1]
    plan[NUM_SCRATCH_ROWS] = scratch_rows.sum()
    plan[PLAN_SIZE] = len(plan)
    plan[HEADER_SIZE : HEADER_SIZE + columns.size] = columns.T[longest_first].ravel()
    plan[HEADER_SIZE + columns.size :] = tables
    return plan


def max_scratch_rows(num_rows: int, max_length: int) -> int:
    """Scratch rows that a split plan can ask for: `num_rows` rows that see up to `max_length` keys each."""
    return num_rows * -(-max_length // SEGMENT)


def max_plan_size(num_rows: int, max_length: int, num_blocks: int) -> int:
    """Largest plan of `num_rows` rows, split or not, of streams that hold `num_blocks` blocks together."""
    return HEADER_SIZE + ITEM_FIELDS * max_scratch_rows(num_rows, max_length) + num_blocks


def _counted(counts: Array) -> Array:
    """0 .. n-1 for each n: [2, 0, 3] -> [0, 1, 0, 1, 2]."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
