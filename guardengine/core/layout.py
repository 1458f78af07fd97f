"""build_batch(): the one place where lists of chunks become tensors."""

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

    Also returns, for each chunk, the labels that it completes: (row of the step's logits, what is wanted).
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
