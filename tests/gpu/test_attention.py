"""Paged attention in Triton: as close to exact as the reference is, and the same bits in any company."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from native_ops import assert_close_as_torch
from pairwise import grid
from ragged_batches import RaggedBatch, ragged_batch, shapes
from torch import Tensor
from triton_interpreter import program_order
from triton_memory import OutOfBounds, Race

from guardengine.kernels import reference
from guardengine.kernels.gpu import attention
from guardengine.kernels.gpu import attention_kernel as kernel
from guardengine.kernels.gpu import plan as plans

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
LONG = 2 * plans.SEGMENT + 40


def attend(
    batch: RaggedBatch,
    *,
    split: bool,
    tall: bool = False,
    wide_mma: bool = False,
    num_programs: int = 3,
    scratch: attention.AttentionScratch | None = None,
    edit: Any = None,
) -> Tensor:
    """Run one form of the kernel; `edit` may change the plan."""
    num_heads, head_dim = batch.q.shape[1:]
    num_kv_heads = batch.k_cache.shape[2]
    rows = attention.attention_tile_rows(num_heads, num_kv_heads, head_dim, batch.q.dtype, wide_mma=wide_mma)
    plan = plans.plan_attention(
        batch.cu_seqlens_q.numpy(),
        batch.positions.numpy(),
        batch.block_tables.numpy(),
        block_size=batch.k_cache.shape[1],
        tile_rows=rows.tile_rows,
        tall_rows=rows.tall_rows if tall else 0,
        split=split,
    )
    assert bool(plan[plans.NUM_TALL_ITEMS]) == tall
    if edit is not None:
        edit(plan)
    if split and scratch is None:
        num_rows = int(plan[plans.NUM_SCRATCH_ROWS])
        scratch = attention.attention_scratch(num_rows, num_heads, num_kv_heads, head_dim, batch.q.device)
        scratch.sums.fill_(torch.nan)
        scratch.stats.fill_(torch.nan)
    out = attention.planned_attention(
        batch.q, batch.k_cache, batch.v_cache, torch.from_numpy(plan), batch.positions.int(), head_dim**-0.5,
        batch.k_scales, batch.v_scales, scratch=scratch, out=torch.full_like(batch.q, torch.nan),
        num_programs=num_programs, wide_mma=wide_mma,
    )  # fmt: skip
    if scratch is not None:
        assert not scratch.counters.any()
    return out


def exact_attention(batch: RaggedBatch) -> Tensor:
    """The formula in float64 over the dense keys and values, as they are stored."""
    cast = [
        tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for tensor in batch[:8]
    ]
    q, k_cache, v_cache, tables, bounds, positions, k_scales, v_scales = cast
    if k_scales is not None:
        k_cache = k_cache.double() * k_scales.transpose(1, 2)[..., None]
        v_cache = v_cache.double() * v_scales.transpose(1, 2)[..., None]
    return reference.paged_attention(q, k_cache, v_cache, tables, bounds, positions, q.shape[-1] ** -0.5)


def rows_of(batch: RaggedBatch, rows: list[int]) -> RaggedBatch:
    """Some rows of a batch's only stream."""
    return batch._replace(
        q=batch.q[rows], positions=batch.positions[rows], cu_seqlens_q=torch.tensor([0, len(rows)])
    )


def assert_matches(batch: RaggedBatch, out: Tensor) -> None:
    plain = reference.paged_attention(*batch.arguments(batch.q.shape[-1] ** -0.5))
    assert_close_as_torch(out, plain, exact_attention(batch))


# -- closeness -------------------------------------------------------------------------------------------------


@grid(
    case=range(6),
    # No int8 under float16: values times their scales leave its range of full precision; models are bf16.
    numbers=[
        (dtype, int8) for dtype in DTYPES for int8 in (False, True) if (dtype, int8) != (torch.float16, True)
    ],
    split=[True, False],
)
def test_paged_attention(case: int, numbers: tuple[torch.dtype, bool], split: bool) -> None:
    dtype, int8 = numbers
    lengths, wanted = shapes(16, plans.SEGMENT)[case]
    batch = ragged_batch(lengths, wanted, block_size=16, dtype=dtype, int8=int8)
    assert_matches(batch, attend(batch, split=split))


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(4, 1, 16, 1), (3, 1, 64, 3), (2, 2, 128, 32), (20, 1, 16, 7), (6, 2, 32, 512)],
)
def test_other_models(num_heads, num_kv_heads, head_dim, block_size, split) -> None:
    wanted = [[3, 100, 255, 256, 299], [0], [30, 31]]
    batch = ragged_batch(
        [300, 1, 32], wanted, block_size=block_size, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, dtype=torch.float32,
    )  # fmt: skip
    assert_matches(batch, attend(batch, split=split))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("head_dim", "wide_mma"), [(32, False), (32, True), (256, True)])
def test_tall_tiles(head_dim: int, wide_mma: bool, int8: bool) -> None:
    """Prompts beside streams of a few rows: one begins with its stream, one goes on behind an edge of a segment."""
    wanted = [list(range(150)), [39], list(range(250, 320)), [5, 6, 7], []]
    batch = ragged_batch(
        [150, 40, 330, 8, 3], wanted, block_size=16, head_dim=head_dim, dtype=torch.bfloat16, int8=int8
    )
    out = attend(batch, split=False, tall=True, wide_mma=wide_mma)
    assert_matches(batch, out)
    for num_programs in (1, 20):
        again = attend(batch, split=False, tall=True, wide_mma=wide_mma, num_programs=num_programs)
        assert torch.equal(again, out)
    short = [150, *range(221, 224)]
    assert torch.equal(out[short], attend(batch, split=False)[short])  # they are no part of it


def test_tall_tiles_never_read_later_keys() -> None:
    batch = ragged_batch([300], [list(range(100, 300))], block_size=4, dtype=torch.bfloat16)
    before = attend(batch, split=False, tall=True)
    for cache in (batch.k_cache, batch.v_cache):
        cache[batch.block_tables[0, 55:]] = torch.nan  # positions from 220 on
    after = attend(batch, split=False, tall=True)
    assert torch.equal(after[:120], before[:120])
    assert after[120:].isnan().all()


@pytest.mark.parametrize("num_rows", [3, 70])
def test_the_contract_operator_takes_either_form(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ragged_batch([300, 80], [[299], list(range(80 - num_rows, 79))], block_size=16)
    forms = []
    planned = attention.planned_attention

    def observed(*args: Any, **kwargs: Any) -> Tensor:
        forms.append(kwargs["scratch"] is not None)
        return planned(*args, **kwargs)

    monkeypatch.setattr(attention, "planned_attention", observed)
    out = attention.paged_attention(*batch.arguments(32**-0.5))
    assert forms == [num_rows <= attention.SMALL_ROWS]
    if num_rows == 3:
        assert torch.equal(out, attend(batch, split=False))
    else:
        assert torch.equal(out, attend(batch, split=False, tall=True))


def test_caches_of_another_float_dtype() -> None:
    batch = ragged_batch([70, 9], [[60, 69], [8]], block_size=16, dtype=torch.bfloat16)
    batch = batch._replace(q=batch.q.float())
    assert_matches(batch, attend(batch, split=True))


@pytest.mark.parametrize("split", [True, False])
def test_one_huge_score(split: bool) -> None:
    """Scores far apart, in any tile or segment: the maximum moves, or makes everything else vanish."""
    for place in (0, 70, 256, LONG - 1):
        batch = ragged_batch(
            [LONG], [[LONG - 1]], block_size=16, num_heads=1, num_kv_heads=1, dtype=torch.float32
        )
        block, offset = batch.block_tables[0, place // 16], place % 16
        batch.k_cache[block, offset] = batch.q[0] * 1000
        out = attend(batch, split=split)
        torch.testing.assert_close(out[0], batch.values[0][place], rtol=1e-5, atol=1e-5)


# -- the same bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "int8"), [(torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True)]
)
def test_bits_depend_on_nothing_but_the_stream(dtype: torch.dtype, int8: bool) -> None:
    """One shot in both forms, chunks of 1, 4 and 16, picked rows: all of them equal."""
    edge = plans.SEGMENT
    wanted = list(range(edge - 9, edge + 7))
    batch = ragged_batch([edge + 7], [wanted], block_size=16, dtype=dtype, int8=int8)
    whole = attend(batch, split=False)
    assert whole.isfinite().all()
    assert torch.equal(attend(batch, split=True), whole)
    for chunk in (1, 4, 7):
        for start in range(0, len(wanted), chunk) if chunk > 1 else (0, 7, 8, 9, 10, 15):
            rows = list(range(start, min(start + chunk, len(wanted))))
            assert torch.equal(attend(rows_of(batch, rows), split=True), whole[rows]), rows
    picked = [0, 8, 9, 15]
    for split in (True, False):
        assert torch.equal(attend(rows_of(batch, picked), split=split), whole[picked])


def test_bits_do_not_depend_on_the_crowd() -> None:
    lengths = [LONG, 3, 40, 1, 257, 5]
    wanted = [[LONG - 2, LONG - 1], [2], [36, 37, 38, 39], [0], [255, 256], []]
    crowd = ragged_batch(lengths, wanted, block_size=16)
    whole = attend(crowd, split=True)
    assert torch.equal(attend(crowd, split=False), whole)
    bounds = crowd.cu_seqlens_q.tolist()
    for stream in (0, 2, 4):
        rows = slice(bounds[stream], bounds[stream + 1])
        alone = crowd._replace(
            q=crowd.q[rows], positions=crowd.positions[rows], block_tables=crowd.block_tables[stream : stream + 1],
            cu_seqlens_q=torch.tensor([0, len(wanted[stream])]),
        )  # fmt: skip
        for split in (True, False):
            assert torch.equal(attend(alone, split=split), whole[rows])


@pytest.mark.parametrize("split", [True, False])
def test_bits_do_not_depend_on_programs_or_the_order_of_items(split: bool) -> None:
    batch = ragged_batch([LONG, 20, 300], [[LONG - 1], [18, 19], [256, 299]], block_size=16)
    expected = attend(batch, split=split)

    def reverse(plan: np.ndarray) -> None:
        end = plans.HEADER_SIZE + plan[plans.NUM_ITEMS] * plans.ITEM_FIELDS
        items = plan[plans.HEADER_SIZE : end].reshape(-1, plans.ITEM_FIELDS)
        items[:] = items[::-1].copy()

    for num_programs in (1, 2, 20):
        assert torch.equal(attend(batch, split=split, num_programs=num_programs), expected)
    for order in ("descending", 1):
        with program_order(order):
            assert torch.equal(attend(batch, split=split, num_programs=20), expected)
            assert torch.equal(attend(batch, split=split, num_programs=5, edit=reverse), expected)


def test_a_replayed_launch_gives_the_same_bits() -> None:
    """With the scratch of the launch before it, whose counters must be zero again; `attend` checks that they are."""
    batch = ragged_batch([LONG, 300], [[LONG - 1], [298, 299]], block_size=16)
    scratch = attention.attention_scratch(plans.max_scratch_rows(3, LONG), 4, 2, 32, batch.q.device)
    first = attend(batch, split=True, scratch=scratch)
    other = ragged_batch([LONG + 9], [[7, LONG + 8]], block_size=16, seed=5)
    attend(other, split=True, scratch=scratch)
    assert torch.equal(attend(batch, split=True, scratch=scratch), first)


@pytest.mark.parametrize("split", [True, False])
def test_a_row_never_reads_later_keys(split: bool) -> None:
    """Later slots may hold what other rows of the same call just stored: even NaN there changes nothing."""
    batch = ragged_batch([300], [[40, 255, 290, 299]], block_size=4)
    before = attend(batch, split=split)
    for cache in (batch.k_cache, batch.v_cache):
        cache[batch.block_tables[0, 73:]] = torch.nan  # positions from 292 on
    after = attend(batch, split=split)
    assert torch.equal(after[:3], before[:3])
    assert after[3].isnan().all()
    batch.v_cache[batch.block_tables[0, 64], 1] = torch.inf  # position 257
    after = attend(batch, split=split)
    assert torch.equal(after[:2], before[:2])
    assert not after[2].isfinite().any()


@pytest.mark.parametrize("split", [True, False])
def test_rows_without_an_item_are_left_alone(split: bool) -> None:
    """Rows of a bucket past the last stream: not read, not written."""
    batch = ragged_batch([20, 30], [[19], [28, 29]], block_size=16)
    expected = attend(batch, split=split)
    garbage = torch.full_like(batch.q[:2], torch.nan)
    padded = batch._replace(
        q=torch.cat((batch.q, garbage)), positions=torch.cat((batch.positions, torch.tensor([1 << 30, -1])))
    )
    out = attend(padded, split=split)
    assert torch.equal(out[:3], expected)
    assert out[3:].isnan().all()


def test_an_empty_plan_computes_nothing() -> None:
    batch = ragged_batch([20], [[]], block_size=16)._replace(positions=torch.tensor([], dtype=torch.int64))
    assert attend(batch, split=True).shape == (0, 4, 32)
    assert attention.paged_attention(*batch.arguments(1.0)).shape == (0, 4, 32)


# -- planted bugs must be seen ---------------------------------------------------------------------------------


def edit_item(field: int, change: int, item: int = 0) -> Any:
    def edit(plan: np.ndarray) -> None:
        plan[plans.HEADER_SIZE + item * plans.ITEM_FIELDS + field] += change

    return edit


@pytest.mark.parametrize("split", [True, False])
def test_a_wrong_plan_gives_a_wrong_result(split: bool) -> None:
    batch = ragged_batch([300, 40], [[280, 290], [39]], block_size=16, dtype=torch.float32)
    assert_matches(batch, attend(batch, split=split))
    for field, change in ((plans.TABLE_OFFSET, 1), (plans.END_KEY, -1), (plans.NUM_ROWS, -1)):
        with pytest.raises((AssertionError, OutOfBounds)):
            assert_matches(batch, attend(batch, split=split, edit=edit_item(field, change)))


def test_addresses_outside_are_seen() -> None:
    batch = ragged_batch([300], [[299]], block_size=16)

    def last_block(plan: np.ndarray) -> None:
        plan[-1] = len(batch.k_cache)

    with pytest.raises(OutOfBounds, match="k_ptr"):
        attend(batch, split=True, edit=last_block)
    with pytest.raises(OutOfBounds, match="plan_ptr"):
        attend(batch, split=False, edit=edit_item(plans.END_KEY, 16))
    with pytest.raises(OutOfBounds, match="stats_ptr"):
        attend(batch, split=True, edit=edit_item(plans.SCRATCH_ROW, 1, item=1))


def test_scratch_holds_valid_rows_only() -> None:
    """Not a row more is written than the plan counts: the rest of a larger scratch stays as it was."""
    batch = ragged_batch([300, 280], [[280, 299], [279]], block_size=16)
    scratch = attention.attention_scratch(9, 4, 2, 32, batch.q.device)
    scratch.sums.fill_(7.0)
    attend(batch, split=True, scratch=scratch)
    written = (scratch.sums != 7.0).any(-1).any(-1)
    assert written.tolist() == [True] * 6 + [False] * 3


def test_a_row_that_sees_too_much_is_seen() -> None:
    """Without the causal mask, rows before a tile's last one are wrong."""
    batch = ragged_batch([60], [[50, 59]], block_size=16, dtype=torch.float32)
    moved = batch._replace(positions=torch.tensor([59, 59]))
    with pytest.raises(AssertionError):
        assert_matches(batch, attend(moved, split=True))


def test_a_missing_barrier_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stores of all threads must precede the count that one thread makes."""
    batch = ragged_batch([300], [[299]], block_size=16)
    monkeypatch.setattr(kernel.tl, "debug_barrier", lambda: None)
    with pytest.raises(Race):
        attend(batch, split=True)


# -- refusals --------------------------------------------------------------------------------------------------


def test_what_the_kernel_does_not_take_is_refused() -> None:
    batch = ragged_batch([4], [[3]], head_dim=48)
    with pytest.raises(ValueError, match="head_dim=48"):
        attend(batch, split=True)
    batch = ragged_batch([4], [[3]], num_heads=66)
    with pytest.raises(ValueError, match="33 query heads"):
        attend(batch, split=True)
    batch = ragged_batch([4], [[3]], int8=True)
    with pytest.raises(ValueError, match="int8 caches have scales"):
        attend(batch._replace(k_scales=None), split=True)
    batch = ragged_batch([4], [[3]])
    with pytest.raises(ValueError, match="q of shape"):
        attend(batch._replace(q=torch.empty(1, 32, 4, dtype=batch.q.dtype).transpose(1, 2)), split=True)
