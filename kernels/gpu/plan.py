"""plan_attention(): how a ragged batch of rows is cut into the work items of the attention kernel.

Pure numpy on the host, before every step. The plan is one int32 array, so that it travels in the step's only copy:

    [0, HEADER_SIZE)     number of items, scratch rows needed, size of the array, number of tall items, zeros
    items                ITEM_FIELDS numbers each, named below; longest first, so that no program is left with one
    tall items           the same
    block ids            of every stream, one after another, only as far as its rows look

A tile is up to `tile_rows` rows of one stream; keys are cut at every multiple of SEGMENT, counted from position 0.
With `split` an item is a tile and one segment, otherwise a tile and all of its segments. Streams with more rows than
two tiles have, in a plan that is not split, are cut into tall items of up to `tall_rows` rows instead.

An example with blocks of 128 tokens and tiles of 2 rows. Stream 0 has one row, at position 299, which sees 300 keys, in
the blocks 7, 3 and 9. Stream 1 has the rows 1, 2 and 3, at positions 0, 1 and 2, in block 5:

    >>> batch = {
    ...     "cu_seqlens_q": np.array([0, 1, 4]),
    ...     "positions": np.array([299, 0, 1, 2]),
    ...     "block_tables": np.array([[7, 3, 9], [5, -1, -1]]),
    ... }
    >>> plan = plan_attention(**batch, block_size=128, tile_rows=2, split=True)

Stream 0's row is a tile of two items: its keys 0 to 255, then 256 to 299. Each leaves its sums in a scratch row (0 and
1), and the last of both to finish merges them. Stream 1's rows are two tiles of one item each, which need no scratch
memory; the tile that sees 3 keys comes before the one that sees 2:

    >>> num_items = plan[NUM_ITEMS]
    >>> plan[:4].tolist()  # items, scratch rows, size, tall items
    [4, 2, 44, 0]
    >>> items = plan[HEADER_SIZE : HEADER_SIZE + num_items * ITEM_FIELDS].reshape(-1, ITEM_FIELDS)
    >>> items[:, [FIRST_ROW, NUM_ROWS, FIRST_KEY, END_KEY, TABLE_OFFSET, SEGMENT_INDEX, NUM_SEGMENTS]].tolist()
    [[0, 1, 0, 256, 40, 0, 2], [0, 1, 256, 300, 42, 1, 2], [3, 1, 0, 3, 43, 0, 1], [1, 2, 0, 2, 43, 0, 1]]
    >>> plan[40:].tolist()  # block ids: key 256 is in the third block of stream 0, at 42
    [7, 3, 9, 5]

Not split, stream 0's row is one item that walks all its keys:

    >>> plan = plan_attention(**batch, block_size=128, tile_rows=2, split=False)
    >>> items = plan[HEADER_SIZE:32].reshape(-1, ITEM_FIELDS)
    >>> items[:, [FIRST_ROW, NUM_ROWS, FIRST_KEY, END_KEY]].tolist()
    [[0, 1, 0, 300], [3, 1, 0, 3], [1, 2, 0, 2]]
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SEGMENT = 256  # keys; part of the result's bits: sums over a segment are merged in ascending order

HEADER_SIZE = 8
NUM_ITEMS, NUM_SCRATCH_ROWS, PLAN_SIZE, NUM_TALL_ITEMS = range(4)

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
    tall_rows: int = 0,
    split: bool,
) -> npt.NDArray[np.int32]:
    """Cut a ragged batch into work items. An example stands at the top of this file.

    Args:
        cu_seqlens_q: [B+1], any integers: stream b has the rows cu_seqlens_q[b] to cu_seqlens_q[b+1] - 1, maybe none.
            Rows from cu_seqlens_q[-1] on are padding and get no item.
        positions: [T], any integers, ascending within a stream.
        block_tables: [B, M], any integers; read as far as a stream's last row looks.
        block_size: Tokens of a block, S.
        tile_rows: Rows of a tile at most.
        tall_rows: Rows of a tall tile at most; 0: none is tall.
        split: Whether a tile's segments are items of their own.

    Returns:
        [size] int32, in the format at the top of this file.
    """
    counts = cu_seqlens_q[1:] - cu_seqlens_q[:-1]
    live = counts.nonzero()[0]
    ends = cu_seqlens_q[1:][live]
    counts = counts[live]
    used_blocks = positions[ends - 1] // block_size + 1
    if len(live) < len(block_tables):
        block_tables = block_tables[live]
    is_used = np.arange(block_tables.shape[1]) < used_blocks[:, None]
    block_ids = block_tables.ravel()[is_used.ravel().nonzero()[0]]

    # The tiles of each stream, then the segments of each tile: a row of fields is copied for each and adjusted.
    streams = np.empty((len(live), ITEM_FIELDS), dtype=np.int32)
    streams[:, FIRST_ROW] = ends - counts
    streams[:, NUM_ROWS] = counts
    streams[:, TABLE_OFFSET] = used_blocks.cumsum() - used_blocks
    is_tall = (counts > 2 * tile_rows) & (tall_rows > 0) & (not split)
    heights = np.where(is_tall, tall_rows, tile_rows)
    tile_counts = -(-counts // heights)
    tiles = streams.repeat(tile_counts, axis=0)
    heights, is_tall = heights.repeat(tile_counts), is_tall.repeat(tile_counts)
    row_in_stream = _counted(tile_counts) * heights
    tiles[:, FIRST_ROW] += row_in_stream
    num_rows = np.minimum(tiles[:, NUM_ROWS] - row_in_stream, heights)
    tiles[:, NUM_ROWS] = num_rows
    end_keys = positions[tiles[:, FIRST_ROW] + num_rows - 1] + 1
    tiles[:, END_KEY] = end_keys
    num_segments = -(-end_keys // SEGMENT) if split else np.ones_like(end_keys)
    tiles[:, NUM_SEGMENTS] = num_segments
    scratch_rows = np.where(num_segments > 1, num_rows * num_segments, 0)
    tiles[:, SCRATCH_ROW] = scratch_rows.cumsum() - scratch_rows

    items = tiles.repeat(num_segments, axis=0)
    segment = _counted(num_segments)
    first_key = segment * SEGMENT
    items[:, FIRST_KEY] = first_key
    items[:, SEGMENT_INDEX] = segment
    items[:, TABLE_OFFSET] += HEADER_SIZE + items.size + first_key // block_size
    if split:
        items[:, END_KEY] = np.minimum(items[:, END_KEY], first_key + SEGMENT)
    lengths = items[:, END_KEY] - first_key
    num_tall = 0
    if split or not is_tall.any():
        longest_first = (-lengths).argsort(kind="stable")
    else:  # a tile is an item
        longest_first = np.lexsort((-lengths, is_tall))
        num_tall = int(np.count_nonzero(is_tall))

    header = np.zeros(HEADER_SIZE, dtype=np.int32)
    header[NUM_ITEMS] = len(items) - num_tall
    header[NUM_TALL_ITEMS] = num_tall
    header[NUM_SCRATCH_ROWS] = scratch_rows.sum()
    header[PLAN_SIZE] = HEADER_SIZE + items.size + len(block_ids)
    return np.concatenate(
        (header, items[longest_first].ravel(), block_ids), dtype=np.int32, casting="same_kind"
    )


def max_scratch_rows(num_rows: int, max_length: int) -> int:
    """Scratch rows that a split plan can ask for.

    Args:
        num_rows: Rows of the step.
        max_length: Keys that a row sees at most.
    """
    return num_rows * -(-max_length // SEGMENT)


def max_plan_size(num_rows: int, max_length: int, num_blocks: int, *, split: bool) -> int:
    """The largest plan.

    Args:
        num_rows: Rows of the step.
        max_length: Keys that a row sees at most.
        num_blocks: Blocks of all its streams together.
        split: As in `plan_attention`.

    Returns:
        Numbers of int32.
    """
    num_items = max_scratch_rows(num_rows, max_length) if split else num_rows
    return HEADER_SIZE + ITEM_FIELDS * num_items + num_blocks


def _counted(counts: Array) -> Array:
    """0 .. n-1 for each n: [2, 0, 3] -> [0, 1, 0, 1, 2]."""
    ends = counts.cumsum()
    counted: Array = np.arange(counts.sum()) - (ends - counts).repeat(counts)
    return counted
