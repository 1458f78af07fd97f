"""The Triton kernel of paged attention: a fixed number of programs walks the work units (item, kv head) of a plan.

A row's keys are summed in segments counted from position 0, and segments are merged in ascending order by `_merge`: in
small steps each segment is an item of its own and the last to finish merges, in large steps one program walks them
all. Both do the same arithmetic in the same order, so a row's bits depend neither on its company nor on how its stream
was chunked. Three things keep that true on hardware:

- TILE_M does not reach 64: from there on newer GPUs multiply with other instructions than mma.sync.
- Sums over keys are dot products (that of the weights too, by columns of ones): their order does not depend on how the
  compiler spreads a tile over threads, as that of tl.sum does.
- The compiler fuses no multiplication with an addition (enable_fp_fusion=False).

Tall tiles, of prompts in large steps, are the exception: they are there for those other instructions, and their keys
are summed in one go. cuBLAS' products in such steps do not keep a row's bits either.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from guardengine.kernels.gpu import plan as plans
from guardengine.kernels.gpu.arrival import is_last_to_arrive

_NUM_ITEMS = tl.constexpr(plans.NUM_ITEMS)
_NUM_TALL_ITEMS = tl.constexpr(plans.NUM_TALL_ITEMS)
_HEADER_SIZE = tl.constexpr(plans.HEADER_SIZE)
_ITEM_FIELDS = tl.constexpr(plans.ITEM_FIELDS)
_FIRST_ROW = tl.constexpr(plans.FIRST_ROW)
_NUM_ROWS = tl.constexpr(plans.NUM_ROWS)
_FIRST_KEY = tl.constexpr(plans.FIRST_KEY)
_END_KEY = tl.constexpr(plans.END_KEY)
_TABLE_OFFSET = tl.constexpr(plans.TABLE_OFFSET)
_SEGMENT_INDEX = tl.constexpr(plans.SEGMENT_INDEX)
_NUM_SEGMENTS = tl.constexpr(plans.NUM_SEGMENTS)
_SCRATCH_ROW = tl.constexpr(plans.SCRATCH_ROW)
_SEGMENT = tl.constexpr(plans.SEGMENT)
_NO_KEY = tl.constexpr(-math.inf)  # the maximum over no keys
_SUM_COLUMNS = tl.constexpr(16)  # the narrowest right-hand side of a dot product


@triton.jit
def _merge(top_a, total_a, sums_a, top_b, total_b, sums_b):
    """Softmax state (maximum, sum of weights, weighted values) of two sets of keys together.

    A set without keys (-inf, 0, 0) on either side changes no bit of the other.
    """
    top = tl.maximum(top_a, top_b)
    base = tl.where(top == _NO_KEY, 0.0, top)
    scale_a, scale_b = tl.exp2(top_a - base), tl.exp2(top_b - base)
    total = total_a * scale_a + total_b * scale_b
    sums = sums_a * scale_a[:, None] + sums_b * scale_b[:, None]
    return top, total, sums


@triton.jit
def _attend_to_tile(
    top,
    totals,
    sums,
    q,
    row_positions,
    start,
    end_key,
    table_ptr,
    kv_head,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    IS_TALL: tl.constexpr,
    SEES_ALL: tl.constexpr,
):
    """Online softmax over keys start .. start + BLOCK_KEYS, as far as end_key.

    With SEES_ALL every row sees all of them. Without, a key that a row does not see leaves its state as it is, even
    if the slot holds NaN: the score is masked, and a value that is not finite moves into the weights of the rows that
    see it, since 0 * NaN is NaN.
    """
    keys = start + tl.arange(0, BLOCK_KEYS)
    live = keys < end_key
    dims = tl.arange(0, HEAD_DIM)
    block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    token_in_block = keys % BLOCK_SIZE
    offsets = block * (BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM)
    offsets += (token_in_block * NUM_KV_HEADS + kv_head) * HEAD_DIM
    k = tl.load((k_ptr + dims)[None, :] + offsets[:, None], mask=live[:, None], other=0)
    v = tl.load((v_ptr + dims)[None, :] + offsets[:, None], mask=live[:, None], other=0)
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
    if HAS_SCALES:
        scale_offsets = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + token_in_block
        scores *= tl.load(k_scales_ptr + scale_offsets, mask=live, other=0.0)[None, :]
    visible = live[None, :]
    if not SEES_ALL:
        visible = visible & (keys[None, :] <= row_positions[:, None])
    scores = tl.where(visible, scores, _NO_KEY)

    new_top = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(new_top == _NO_KEY, 0.0, new_top)
    decay = tl.exp2(top - base)
    weights = tl.exp2(scores - base[:, None])
    value_weights = weights
    if HAS_SCALES:
        v_scales = tl.load(v_scales_ptr + scale_offsets, mask=live, other=0.0)
        value_weights = tl.where(visible, weights * v_scales[None, :], 0.0)
    elif not SEES_ALL:
        not_finite = v.to(tl.float32) * 0.0  # zero or NaN
        value_weights = tl.where(visible, weights + tl.sum(not_finite, axis=1)[None, :], 0.0)
        v = tl.where(not_finite == 0.0, v, 0.0)
    if IS_TALL:
        totals = totals * decay + tl.sum(weights, axis=1)
    else:
        ones = tl.full((BLOCK_KEYS, _SUM_COLUMNS), 1.0, q.dtype)
        totals = tl.dot(weights.to(q.dtype), ones, totals * decay[:, None], input_precision="ieee")
    sums = tl.dot(value_weights.to(q.dtype), v.to(q.dtype), sums * decay[:, None], input_precision="ieee")
    return new_top, totals, sums


@triton.jit
def _attend_to_segment(
    q,
    row_positions,
    least_position,
    start_key,
    end_key,
    table_ptr,
    kv_head,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    KEY_STAGES: tl.constexpr,
    IS_TALL: tl.constexpr,
):
    """Softmax state of each row over keys start_key .. end_key, a segment or the beginning of one."""
    top = tl.full((TILE_M,), _NO_KEY, tl.float32)
    totals = tl.zeros((TILE_M,) if IS_TALL else (TILE_M, _SUM_COLUMNS), tl.float32)
    sums = tl.zeros((TILE_M, HEAD_DIM), tl.float32)
    masked_start = end_key
    # From the tile of keys on that holds the first one which a row does not see.
    if least_position + 1 < end_key:
        masked_start = start_key + tl.maximum(least_position + 1 - start_key, 0) // BLOCK_KEYS * BLOCK_KEYS
    for start in tl.range(start_key, masked_start, BLOCK_KEYS, num_stages=KEY_STAGES):
        top, totals, sums = _attend_to_tile(
            top, totals, sums, q, row_positions, start, end_key, table_ptr, kv_head, k_ptr, v_ptr, k_scales_ptr,
            v_scales_ptr, scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_KEYS, HAS_SCALES, IS_TALL, SEES_ALL=True,
        )  # fmt: skip
    for start in tl.range(masked_start, end_key, BLOCK_KEYS, num_stages=1):
        top, totals, sums = _attend_to_tile(
            top, totals, sums, q, row_positions, start, end_key, table_ptr, kv_head, k_ptr, v_ptr, k_scales_ptr,
            v_scales_ptr, scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_KEYS, HAS_SCALES, IS_TALL, SEES_ALL=False,
        )  # fmt: skip
    if not IS_TALL:
        totals = tl.max(totals, axis=1)  # its columns are equal
    return top, totals, sums


@triton.jit
def paged_attention_kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    v_scales_ptr,
    positions_ptr,
    plan_ptr,
    sums_ptr,
    stats_ptr,
    counters_ptr,
    scale,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    KEY_STAGES: tl.constexpr,
    FORM: tl.constexpr,
):
    """Walk the work units (item, kv head) of a plan: of a split one, of one that is not ("walk"), or its tall ones.

    The TILE_M members of a tile are its rows times the GROUP query heads that share a kv head.
    """
    items_ptr = plan_ptr + _HEADER_SIZE
    num_items = tl.load(plan_ptr + _NUM_ITEMS)
    if FORM == "tall":
        items_ptr += num_items * _ITEM_FIELDS
        num_items = tl.load(plan_ptr + _NUM_TALL_ITEMS)
    num_units = num_items * NUM_KV_HEADS
    member = tl.arange(0, TILE_M)
    dims = tl.arange(0, HEAD_DIM)
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        kv_head = unit % NUM_KV_HEADS
        item_ptr = items_ptr + unit // NUM_KV_HEADS * _ITEM_FIELDS
        first_row = tl.load(item_ptr + _FIRST_ROW)
        num_rows = tl.load(item_ptr + _NUM_ROWS)
        first_key = tl.load(item_ptr + _FIRST_KEY)
        end_key = tl.load(item_ptr + _END_KEY)
        table_ptr = plan_ptr + (tl.load(item_ptr + _TABLE_OFFSET) - first_key // BLOCK_SIZE)

        row = member // GROUP
        head = kv_head * GROUP + member % GROUP
        valid = row < num_rows
        # Members that are not valid see every key: they never decide what a tile has to mask.
        row_positions = tl.load(positions_ptr + first_row + row, mask=valid, other=2147483647).to(tl.int32)
        least_position = tl.min(row_positions, axis=0)
        out_offsets = (first_row + row).to(tl.int64) * (NUM_KV_HEADS * GROUP * HEAD_DIM) + head * HEAD_DIM
        q = tl.load((q_ptr + dims)[None, :] + out_offsets[:, None], mask=valid[:, None], other=0.0)

        if FORM == "tall":
            top, total, sums = _attend_to_segment(
                q, row_positions, least_position, first_key, end_key, table_ptr, kv_head, k_ptr, v_ptr, k_scales_ptr,
                v_scales_ptr, scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE_M, BLOCK_KEYS, HAS_SCALES, KEY_STAGES,
                IS_TALL=True,
            )  # fmt: skip
            _store_rows(out_ptr, out_offsets, valid, total, sums, HEAD_DIM)
        elif FORM == "walk":
            top = tl.full((TILE_M,), _NO_KEY, tl.float32)
            total = tl.zeros((TILE_M,), tl.float32)
            sums = tl.zeros((TILE_M, HEAD_DIM), tl.float32)
            for start in range(first_key, end_key, _SEGMENT):
                top_b, total_b, sums_b = _attend_to_segment(
                    q, row_positions, least_position, start, tl.minimum(start + _SEGMENT, end_key), table_ptr, kv_head,
                    k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE_M,
                    BLOCK_KEYS, HAS_SCALES, KEY_STAGES, IS_TALL=False,
                )  # fmt: skip
                top, total, sums = _merge(top, total, sums, top_b, total_b, sums_b)
            _store_rows(out_ptr, out_offsets, valid, total, sums, HEAD_DIM)
        else:
            top, total, sums = _attend_to_segment(
                q, row_positions, least_position, first_key, end_key, table_ptr, kv_head,
                k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, scale, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE_M,
                BLOCK_KEYS, HAS_SCALES, KEY_STAGES, IS_TALL=False,
            )  # fmt: skip
            num_segments = tl.load(item_ptr + _NUM_SEGMENTS)
            if num_segments == 1:
                _store_rows(out_ptr, out_offsets, valid, total, sums, HEAD_DIM)
            else:
                # Row r of segment s waits in scratch row scratch_row + s * num_rows + r.
                scratch_row = tl.load(item_ptr + _SCRATCH_ROW)
                segment_rows = scratch_row + tl.load(item_ptr + _SEGMENT_INDEX) * num_rows + row
                offsets = segment_rows.to(tl.int64) * (NUM_KV_HEADS * GROUP) + head
                tl.store(stats_ptr + offsets * 2, top, mask=valid)
                tl.store(stats_ptr + offsets * 2 + 1, total, mask=valid)
                tl.store((sums_ptr + dims)[None, :] + offsets[:, None] * HEAD_DIM, sums, mask=valid[:, None])
                if is_last_to_arrive(counters_ptr + scratch_row * NUM_KV_HEADS + kv_head, num_segments):
                    top = tl.full((TILE_M,), _NO_KEY, tl.float32)
                    total = tl.zeros((TILE_M,), tl.float32)
                    sums = tl.zeros((TILE_M, HEAD_DIM), tl.float32)
                    for segment in tl.range(0, num_segments, num_stages=3):
                        segment_rows = scratch_row + segment * num_rows + row
                        offsets = segment_rows.to(tl.int64) * (NUM_KV_HEADS * GROUP) + head
                        top_b = tl.load(stats_ptr + offsets * 2, mask=valid, other=0.0, cache_modifier=".cg")
                        total_b = tl.load(
                            stats_ptr + offsets * 2 + 1, mask=valid, other=1.0, cache_modifier=".cg"
                        )
                        sums_b = tl.load(
                            (sums_ptr + dims)[None, :] + offsets[:, None] * HEAD_DIM,
                            mask=valid[:, None],
                            other=0.0,
                            cache_modifier=".cg",
                        )
                        top, total, sums = _merge(top, total, sums, top_b, total_b, sums_b)
                    _store_rows(out_ptr, out_offsets, valid, total, sums, HEAD_DIM)


@triton.jit
def _store_rows(out_ptr, out_offsets, valid, total, sums, HEAD_DIM: tl.constexpr):
    # + 0.0: a sum that underflowed to -0 remains -0 only where no unseen keys follow.
    out = ((sums + 0.0) / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store((out_ptr + tl.arange(0, HEAD_DIM))[None, :] + out_offsets[:, None], out, mask=valid[:, None])
