"""The checks of addresses and races: every kind of planted bug is caught, and sound kernels pass."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_interpreter import program_order
from triton_memory import OutOfBounds, Race

# -- bounds ----------------------------------------------------------------------------------------------------


@triton.jit
def _gather_kernel(
    cache_ptr,
    table_ptr,
    out_ptr,
    length,
    stride_out,
    SIZE: tl.constexpr,
    TABLE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Copy one stream's slots [length] out of blocks of SIZE; program i copies block i."""
    i = tl.program_id(0)
    offsets = tl.arange(0, SIZE)
    block = tl.load(table_ptr + i) if TABLE else i
    values = tl.load(cache_ptr + block * SIZE + offsets)
    index = i * SIZE + offsets
    if MASKED:
        tl.store(out_ptr + index * stride_out, values, mask=index < length)
    else:
        tl.store(out_ptr + index * stride_out, values)


def gather(
    blocks: list[int],
    num_programs: int | None = None,
    *,
    length: int = 11,
    stride: int = 1,
    masked: bool = True,
) -> Tensor:
    slab = torch.arange(3 * 5 * 4, dtype=torch.float32).view(3, 5, 4)  # the cache is the middle one
    out = torch.zeros(11)
    table = torch.tensor(blocks, dtype=torch.int32)
    programs = len(blocks) if num_programs is None else num_programs
    _gather_kernel[(programs,)](slab[1], table, out, length, stride, SIZE=4, TABLE=True, MASKED=masked)
    return out - 20


def test_a_clean_gather_passes() -> None:
    assert gather([4, 0, 2]).tolist() == [16, 17, 18, 19, 0, 1, 2, 3, 8, 9, 10]


@pytest.mark.parametrize("block", [5, -1])
def test_a_block_past_the_cache_is_caught(block: int) -> None:
    """Inside the slab's memory, but another layer's."""
    with pytest.raises(OutOfBounds, match=r"_gather_kernel, program \(1, 0, 0\): load of cache_ptr\["):
        gather([4, block, 2])


def test_a_length_past_the_block_table_is_caught() -> None:
    with pytest.raises(OutOfBounds, match=r"table_ptr\[3\] is outside of it: shape \(3,\)"):
        gather([4, 0, 2], 4)


def test_an_output_stride_of_zero_is_caught() -> None:
    with pytest.raises(Race, match=r"stores two values to out_ptr\[0\]"):
        gather([4, 0, 2], stride=0)


def test_a_missing_store_mask_is_caught() -> None:
    with pytest.raises(OutOfBounds, match=r"store of out_ptr\[11\]"):
        gather([4, 0, 2], masked=False)


@triton.jit
def _rows_kernel(x_ptr, out_ptr, stride_x, N: tl.constexpr, WIDTH: tl.constexpr):
    m, n = tl.arange(0, N), tl.arange(0, WIDTH)
    tl.store(out_ptr + m[:, None] * WIDTH + n[None, :], tl.load(x_ptr + m[:, None] * stride_x + n[None, :]))


def test_the_gaps_of_a_view_are_out_of_bounds() -> None:
    x, out = torch.randn(4, 16), torch.empty(4, 8)
    _rows_kernel[(1,)](x[:, 4:12], out, 16, N=4, WIDTH=8)
    assert torch.equal(out, x[:, 4:12])
    with pytest.raises(OutOfBounds, match=r"x_ptr\[8\].*strides \(16, 1\)"):
        _rows_kernel[(1,)](x[:, 4:12], torch.empty(4, 16), 16, N=4, WIDTH=16)
    with pytest.raises(OutOfBounds, match="x_ptr"):
        _rows_kernel[(1,)](torch.empty(0, 8), out, 8, N=4, WIDTH=8)


@triton.jit
def _swap_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    pointers = tl.where(i % 2 == 0, x_ptr + i, y_ptr + i)
    tl.store(out_ptr + i, tl.load(pointers))


def test_a_load_from_two_tensors_at_once_is_refused() -> None:
    with pytest.raises(OutOfBounds):
        _swap_kernel[(1,)](torch.ones(8), torch.ones(8), torch.empty(8), N=8)


# -- races -----------------------------------------------------------------------------------------------------


@triton.jit
def _accumulate_kernel(x_ptr, out_ptr, ATOMIC: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + tl.program_id(0) * N + i)
    if ATOMIC:
        tl.atomic_add(out_ptr + i, x, sem="relaxed")
    else:
        tl.store(out_ptr + i, tl.load(out_ptr + i) + x)


def test_an_accumulation_without_atomics_is_caught(any_program_order: str | int) -> None:
    x = torch.randn(3, 8)
    out = torch.zeros(8)
    _accumulate_kernel[(3,)](x, out, ATOMIC=True, N=8)
    torch.testing.assert_close(out, x.sum(0))
    with pytest.raises(Race, match=r"out_ptr\[0\], which program"):
        _accumulate_kernel[(3,)](x, torch.zeros(8), ATOMIC=False, N=8)


@triton.jit
def _split_kernel(
    x_ptr,
    scratch_ptr,
    counter_ptr,
    out_ptr,
    SEM: tl.constexpr,
    BARRIER: tl.constexpr,
    COUNT: tl.constexpr,
    N: tl.constexpr,
):
    """Column sums of x [programs, N]: each program leaves its part in scratch, the last to arrive adds up."""
    split, num_splits = tl.program_id(0), tl.num_programs(0)
    i = tl.arange(0, N)
    tl.store(scratch_ptr + split * N + i, tl.load(x_ptr + split * N + i))
    if BARRIER:
        tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem=SEM)
    if (arrived == num_splits - 1) == COUNT:
        total = tl.zeros([N], tl.float32)
        for other in range(num_splits if COUNT else 1):
            total += tl.load(scratch_ptr + other * N + i)
        tl.store(out_ptr + i, total)
        tl.store(counter_ptr, 0)


def split(sem: str = "acq_rel", barrier: bool = True, count: bool = True) -> Tensor:
    x, out = torch.arange(32.0).view(4, 8), torch.full((8,), torch.nan)
    scratch, counter = torch.full((4, 8), torch.nan), torch.zeros(1, dtype=torch.int32)
    for _ in range(2):  # the counter is ready for the next launch
        _split_kernel[(4,)](x, scratch, counter, out, SEM=sem, BARRIER=barrier, COUNT=count, N=8)
        assert counter.item() == 0
    assert torch.equal(out, x.sum(0))
    return out


def test_a_split_reduction_by_the_last_to_arrive_passes(any_program_order: str | int) -> None:
    split()


@pytest.mark.parametrize("sem", ["relaxed", "acquire", "release"])
def test_a_split_reduction_without_ordering_is_caught(sem: str) -> None:
    with pytest.raises(
        Race, match=r"loads scratch_ptr\[\d+\], which program \(\d, 0, 0\) stored to, in no order"
    ):
        split(sem)


def test_a_split_reduction_without_a_barrier_is_caught() -> None:
    """Of all warps' stores, a release by the program's first thread covers what a barrier put before it."""
    with pytest.raises(Race, match="debug_barrier"):
        split(barrier=False)


def test_a_merge_before_the_last_arrived_is_caught() -> None:
    with pytest.raises(Race, match="in no order"), program_order("descending"):
        split(count=False)


@triton.jit
def _reread_kernel(x_ptr, BARRIER: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x_ptr + i, i.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + i, tl.load(x_ptr + N - 1 - i))


def test_reading_back_without_a_barrier_is_caught() -> None:
    x = torch.empty(8)
    _reread_kernel[(1,)](x, BARRIER=True, N=8)
    assert x.tolist() == list(range(7, -1, -1))
    with pytest.raises(Race, match="stored itself"):
        _reread_kernel[(1,)](x, BARRIER=False, N=8)


@triton.jit
def _mixed_kernel(out_ptr):
    if tl.program_id(0) == 0:
        tl.store(out_ptr, 0.0)  # meant to run first, but who says so
    tl.atomic_add(out_ptr, 1.0)


def test_zeroing_beside_atomics_is_caught(any_program_order: str | int) -> None:
    with pytest.raises(Race):
        _mixed_kernel[(3,)](torch.zeros(1))
