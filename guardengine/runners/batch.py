"""Batch: one step's input.

A batch is ragged: the chunks' tokens stand one after another without padding, and `cu_seqlens_q` says where
each stream's begin. Shapes follow the dimension key of guardengine.kernels.
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
