"""Batches that break paged kernels: scattered blocks, poisoned slots, streams of every length in one batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from native_ops import rand
from torch import Tensor

from guardengine.kernels.quantization import quantize_rows

LAYERS = 3  # the cache under test is the middle one of a slab, its neighbours are all NaN


class RaggedBatch(NamedTuple):
    """What `paged_attention` takes, with the same keys and values dense for an independent formula."""

    q: Tensor  # [T, H, D]
    k_cache: Tensor  # [N, S, Hkv, D], NaN (int8: 127) wherever no stream has a token
    v_cache: Tensor
    block_tables: Tensor  # [B, M] int32, -1 past a stream's end
    cu_seqlens_q: Tensor  # [B + 1] int32
    positions: Tensor  # [T] int64
    k_scales: Tensor | None  # [N, Hkv, S] float32 for int8 caches, NaN wherever no stream has a token
    v_scales: Tensor | None
    keys: list[Tensor]  # per stream [length, Hkv, D], as stored
    values: list[Tensor]

    def arguments(self, softmax_scale: float) -> tuple[Tensor | float | None, ...]:
        return (*self[:6], softmax_scale, self.k_scales, self.v_scales)


def shapes(block_size: int, segment: int) -> list[tuple[list[int], list[list[int]]]]:
    """(lengths, positions wanted) of each stream, around the edges of blocks of S and segments of keys."""
    s, long = block_size, 2 * segment + 1
    return [
        ([1], [[0]]),
        ([s - 1, s, s + 1], [[s - 2], [s - 1], [s]]),
        ([segment - 1, segment, segment + 1], [[segment - 2], [segment - 1], [segment - 1, segment]]),
        (
            [long, 1, 3, 1, s + 2],
            [[long - 2, long - 1], [0], [0, 1, 2], [0], [s + 1]],
        ),  # one long among short ones
        ([7, 5, 2 * s], [[], [1, 4], []]),  # streams without rows
        ([2 * s + 3, 11], [[2, 7, 2 * s], [0, 10]]),  # rows picked here and there
    ]


def ragged_batch(
    lengths: list[int],
    wanted: list[list[int]],
    *,
    block_size: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    int8: bool = False,
    seed: int = 0,
) -> RaggedBatch:
    """Streams of these lengths over a shuffled cache, queries at the wanted positions of each."""
    shape = (num_kv_heads, head_dim)
    keys = [rand(n, *shape, dtype=dtype, seed=seed + 2 * i) for i, n in enumerate(lengths)]
    values = [rand(n, *shape, dtype=dtype, seed=seed + 2 * i + 1) for i, n in enumerate(lengths)]
    counts = [-(-n // block_size) for n in lengths]
    free = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    stored = torch.int8 if int8 else dtype
    slab = torch.full((LAYERS, 2, len(free), block_size, *shape), 127 if int8 else torch.nan, dtype=stored)
    scales = torch.full((LAYERS, 2, len(free), num_kv_heads, block_size), torch.nan) if int8 else None
    tables = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
    for stream, count in enumerate(counts):
        for index in range(count):
            block = tables[stream, index] = free.pop()
            part = slice(index * block_size, (index + 1) * block_size)
            for kind, rows in enumerate((keys[stream][part], values[stream][part])):
                if scales is not None:
                    rows, row_scales = quantize_rows(rows)
                    scales[1, kind, block, :, : len(rows)] = row_scales.T
                slab[1, kind, block, : len(rows)] = rows
    positions = [p for stream in wanted for p in stream]
    bounds = torch.tensor([0, *(len(stream) for stream in wanted)]).cumsum(0).to(torch.int32)
    return RaggedBatch(
        rand(len(positions), num_heads, head_dim, dtype=dtype, seed=seed + 99),
        *slab[1].unbind(),
        tables,
        bounds,
        torch.tensor(positions),
        *(scales[1].unbind() if scales is not None else (None, None)),
        keys,
        values,
    )
