"""build_batch(): the one place where lists of chunks become tensors.

An example with blocks of 4 tokens. A prompt of 7 tokens lies in the blocks 5 and 3; 2 of its tokens are computed, and
this step computes 3 more. A reply of 6 tokens lies in the blocks 7 and 1; 4 of its tokens are computed, and this step
computes the other 2, each of which wants a label. The prompt's label is wanted at its last token, in a later step.

    prompt   position    0   1   2   3 |  4   5   6        reply   position    0   1   2   3 |  4   5
             token id  100 101 102 103 |104 105 106                token id  200 201 202 203 |204 205
             slot       20  21  22  23 | 12  13  14                slot       28  29  30  31 |  4   5
             chunk              ======   ===                       chunk                       =======

A slot is the place of one token's keys and values in the cache: block * 4 + position % 4.

    >>> from guardengine.core.state import StreamState
    >>> from guardengine.policy import Policy
    >>> wanted = [Wanted(4, "assistant"), Wanted(5, "assistant")]
    >>> prompt = StreamState("prompt", Policy(), [], block_table=array("i", [5, 3]), wanted=[Wanted(6, "user")])
    >>> reply = StreamState("reply", Policy(), [], block_table=array("i", [7, 1]), wanted=wanted)
    >>> prompt.token_ids.extend(range(100, 107))
    >>> reply.token_ids.extend(range(200, 206))
    >>> chunks = [Chunk(prompt, start=2, num_tokens=3), Chunk(reply, start=4, num_tokens=2)]
    >>> batch, completed = build_batch(chunks, block_size=4)

The chunks' tokens stand one after another, T = 5 rows. The first chunk has the rows 0 to 2, the second 3 and 4:

    >>> batch.input_ids.tolist()
    [102, 103, 104, 204, 205]
    >>> batch.rows.positions.tolist()
    [2, 3, 4, 4, 5]
    >>> batch.rows.cu_seqlens_q.tolist()
    [0, 3, 5]

Where each row's keys and values are written, and where those of all tokens up to it are read:

    >>> batch.slot_mapping.tolist()
    [22, 23, 12, 4, 5]
    >>> batch.block_tables.tolist()
    [[5, 3], [7, 1]]

Only rows with a wanted label go through the heads, here W = 2: row 0 of the step's logits is the batch's row 3, and
both belong to the second chunk.

    >>> batch.label_index.tolist()
    [3, 4]
    >>> batch.label_rows.cu_seqlens_q.tolist()
    [0, 0, 2]
    >>> completed[0]
    []
    >>> completed[1]
    [(0, Wanted(position=4, role='assistant')), (1, Wanted(position=5, role='assistant'))]
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from guardengine.core.scheduler import Chunk
from guardengine.core.state import Wanted
from guardengine.runners.batch import Batch, Rows


def build_batch(chunks: list[Chunk], block_size: int) -> tuple[Batch, list[list[tuple[int, Wanted]]]]:
    """Lay out the chunks as one batch.

    Args:
        chunks: what the step computes, at least one. Each stream's block table covers its tokens up to the chunk's end.
        block_size: tokens in a block of the KV cache.

    Returns:
        The batch, in the host's memory, and for each chunk the labels that it completes: (row of the step's logits,
        what is wanted there). The shapes are those of `Batch`: T rows, B chunks, M blocks in the longest table, W rows
        of logits. Where both roles want a label at one position, they share its row.
    """
    starts = np.array([chunk.start for chunk in chunks])
    lengths = np.array([chunk.num_tokens for chunk in chunks])
    cu_seqlens = _cumulative(lengths)
    positions = np.arange(cu_seqlens[-1]) + np.repeat(starts - cu_seqlens[:-1], lengths)
    ids = array("i")
    for state, start, num_tokens in chunks:
        ids += state.token_ids[start : start + num_tokens]
    input_ids = np.frombuffer(ids, dtype=np.intc)

    blocks = array("i")
    for chunk in chunks:
        blocks += chunk.state.block_table
    table_lengths = np.array([len(chunk.state.block_table) for chunk in chunks])
    block_tables = np.full((len(chunks), table_lengths.max()), -1, dtype=np.int32)
    is_used = np.arange(block_tables.shape[1]) < table_lengths[:, None]
    block_tables[is_used] = np.frombuffer(blocks, dtype=np.intc)
    owner = np.repeat(np.arange(len(chunks)), lengths)
    slots = (
        block_tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    )

    label_index: list[int] = []
    label_counts: list[int] = []
    completed: list[list[tuple[int, Wanted]]] = []
    for chunk, start, first_row in zip(chunks, starts.tolist(), cu_seqlens.tolist(), strict=False):
        labels: list[tuple[int, Wanted]] = []
        before = len(label_index)
        for wanted in chunk.state.wanted_in(start, start + chunk.num_tokens):
            row = first_row + wanted.position - start
            if not label_index or label_index[-1] != row:  # both roles may want the same position
                label_index.append(row)
            labels.append((len(label_index) - 1, wanted))
        label_counts.append(len(label_index) - before)
        completed.append(labels)

    def tensor(values: npt.NDArray[np.integer], dtype: type[np.integer] = np.int64) -> Tensor:
        return torch.from_numpy(values.astype(dtype, copy=False))

    index = np.array(label_index, dtype=np.int64)
    batch = Batch(
        input_ids=tensor(input_ids),
        rows=Rows(tensor(positions), tensor(cu_seqlens, np.int32)),
        slot_mapping=tensor(slots),
        block_tables=tensor(block_tables, np.int32),
        label_index=tensor(index),
        label_rows=Rows(tensor(positions[index]), tensor(_cumulative(np.array(label_counts)), np.int32)),
    )
    return batch, completed


def _cumulative(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(lengths)))
