"""How the kernel of `linear` is cut into programs, for each shape of a weight: a rule, candidates, a measured choice.

A configuration belongs to a weight's shape and holds for every number of rows: what it says about the inner
dimension decides in which order sums are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from guardengine.kernels import SMALL_ROWS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN, NORMED, GATED, SUMMED = "linear", "norm_linear", "norm_gate_up", "linear_add"
SHARED_BYTES = 99 * 1024  # of a program on sm_86, sm_89 and sm_120; other GPUs have more


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """How one weight matrix is multiplied."""

    block_m: int  # rows of the result that a program computes at most: 32, or 64 always (see `row_tile`)
    block_n: int  # columns
    block_k: int  # numbers of a row that it multiplies at a time
    split_k: int  # programs that share the inner dimension of one block
    num_warps: int
    num_stages: int

    def row_tile(self, num_rows: int) -> int:
        """Rows that a program computes in a step of `num_rows`.

        16 and 32 rows are multiplied by the same instruction. From 64 on newer GPUs have another, with sums of its own:
        who takes it takes it for any number of rows.
        """
        if self.block_m == 64:
            return 64
        return 16 if num_rows <= 16 else 32

    def shared_bytes(self, operator: str, itemsize: int) -> int:
        """Bytes of tiles on their way, at the most rows."""
        rows = self.row_tile(SMALL_ROWS) + self.block_n * (2 if operator == GATED else 1)
        return rows * self.block_k * itemsize * self.num_stages

    def scratch(self, operator: str, columns: int, max_rows: int) -> tuple[int, int]:
        """Partial sums, and counters, that up to `max_rows` rows need."""
        if self.split_k == 1:
            return 0, 0
        block_m = self.row_tile(max_rows)
        tiles = -(-max_rows // block_m) * -(-columns // self.block_n)
        numbers = self.block_n * (2 if operator == GATED else 1) + (operator in (NORMED, GATED))
        return tiles * self.split_k * block_m * numbers, tiles


def num_columns(operator: str, weight_shape: tuple[int, ...]) -> int:
    """Columns of the result: half as many as the weight has rows where they are gate's and up's."""
    return weight_shape[0] // 2 if operator == GATED else weight_shape[0]


def default_config(
    operator: str, weight_shape: tuple[int, ...], *, dtype: torch.dtype, num_sms: int, max_split: int = 16
) -> LinearConfig:
    """Choose by rule: narrow enough blocks, in enough parts, that there is a program for every multiprocessor.

    A part keeps at least four tiles of the inner dimension, so that loads stay under way.

    Args:
        operator: PLAIN, NORMED, GATED or SUMMED.
        weight_shape: (out, in) of the weight.
        dtype: Its dtype.
        num_sms: Multiprocessors of the GPU.
        max_split: Parts of the inner dimension at most.
    """
    columns, inner = num_columns(operator, weight_shape), weight_shape[1]
    is_normed = operator in (NORMED, GATED)
    # A tile that is normed passes through registers: 32 rows of 128 would leave too few of them.
    block_k = min((128 if is_normed else 256) // dtype.itemsize, max(16, _power_of_two_up_to(inner)))
    tiles_k = -(-inner // block_k)
    for block_n in (64, 32):
        if operator == GATED:
            block_n //= 2
        tiles_n, split_k = -(-columns // block_n), 1
        while split_k < max_split and tiles_n * split_k < num_sms and tiles_k >= 8 * split_k:
            split_k *= 2
        if tiles_n * split_k >= 0.9 * num_sms:
            break
    return LinearConfig(32, block_n, block_k, split_k, num_warps=4, num_stages=6 if is_normed else 4)


def candidates(
    operator: str, weight_shape: tuple[int, int], *, dtype: torch.dtype, num_sms: int, wide_mma: bool = False
) -> list[LinearConfig]:
    """The configurations worth measuring for a weight, the rule's own first. `wide_mma`: the GPU has an instruction for
    64 rows (`has_wide_mma`)."""
    columns, inner = num_columns(operator, weight_shape), weight_shape[1]
    default = default_config(operator, weight_shape, dtype=dtype, num_sms=num_sms)
    found = [default]
    for width, block_k, num_warps, num_stages in _NORMED_TILES if operator in (NORMED, GATED) else _TILES:
        block_n, block_k = width // 2 if operator == GATED else width, block_k * 2 // dtype.itemsize
        tiles_n, tiles_k = -(-columns // block_n), -(-inner // block_k)
        for split_k, block_m in product((1, 2, 4, 8, 16), (32, 64) if wide_mma else (32,)):
            config = LinearConfig(block_m, block_n, block_k, split_k, num_warps, num_stages)
            fits = config.shared_bytes(operator, dtype.itemsize) <= SHARED_BYTES and tiles_k >= 2 * split_k
            # From about one program for each multiprocessor up to three, or as few more as can be.
            programs = tiles_n * split_k
            fills = 0.9 * num_sms <= programs and (programs <= 3 * num_sms or split_k == 1)
            if fits and fills and config not in found:
                found.append(config)
    return found


# Rows of weights, numbers of each, num_warps, num_stages, for 16-bit weights: what compiles without spilled registers
# for sm_80 to sm_120.
_TILES = ((32, 128, 4, 5), (64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 8, 4), (128, 64, 4, 4))
_NORMED_TILES = ((32, 64, 4, 6), (64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 8, 4), (128, 64, 4, 4))


def _power_of_two_up_to(number: int) -> int:
    return 1 << (number.bit_length() - 1)
