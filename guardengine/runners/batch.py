"""Batch: one step's input.

A batch is ragged: the chunks' tokens stand one after another without padding, and `cu_seqlens_q` says where
each stream's begin. Shapes follow the dimension key of guardengine.kernels.

An example with two streams and blocks of 4 tokens. Stream 0 computes its tokens at positions 2, 3 and 4, in the blocks
5 and 3; stream 1 those at positions 4 and 5, in the blocks 7 and 1. Labels are wanted for the two tokens of stream 1:

    >>> batch = Batch(
    ...     input_ids=torch.tensor([102, 103, 104, 204, 205]),
    ...     rows=Rows(torch.tensor([2, 3, 4, 4, 5]), torch.tensor([0, 3, 5])),
    ...     slot_mapping=torch.tensor([22, 23, 12, 4, 5]),
    ...     block_tables=torch.tensor([[5, 3], [7, 1]]),
    ...     label_index=torch.tensor([3, 4]),
    ...     label_rows=Rows(torch.tensor([4, 5]), torch.tensor([0, 0, 2])),
    ... )

Stream 1 has the rows 3 and 4:

    >>> first, end = batch.rows.cu_seqlens_q[1:3].tolist()
    >>> batch.input_ids[first:end].tolist()
    [204, 205]

Row t's keys and values go into block slot // 4 at offset slot % 4, which is what the stream's table says of its
position: position 4 of stream 1 is the first place of its second block.

    >>> slot, position = batch.slot_mapping[3], batch.rows.positions[3]
    >>> (slot // 4).item(), batch.block_tables[1, position // 4].item()
    (1, 1)

Past the last layer's keys and values only the wanted rows are computed. Among those, stream 0 has none:

    >>> batch.label_rows.cu_seqlens_q.tolist()
    [0, 0, 2]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a ragged batch: each one's position in its stream, and where each stream's rows begin."""

    positions: Tensor  # [T] int64
    cu_seqlens_q: Tensor  # [B+1] int32


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input, in the host's memory until a runner moves it."""

    input_ids: Tensor  # [T] int64
    rows: Rows  # all T rows
    slot_mapping: Tensor  # [T] int64
    block_tables: Tensor  # [B, M] int32, -1 past a stream's last block
    label_index: Tensor  # [W] int64, the rows whose label is wanted, ascending
    label_rows: Rows  # those W rows

    def to(self, device: torch.device) -> Batch:
        """This batch with its tensors in the memory of `device`."""
        if device.type == "cpu":
            return self

        def rows(found: Rows) -> Rows:
            return Rows(found.positions.to(device), found.cu_seqlens_q.to(device))

        return Batch(
            self.input_ids.to(device),
            rows(self.rows),
            self.slot_mapping.to(device),
            self.block_tables.to(device),
            self.label_index.to(device),
            rows(self.label_rows),
        )
