"""The guard heads in one launch: final norm, pre-projections, inner norms, classifiers and their readout.

A program multiplies 16 wanted rows with 16 columns of one pair's pre-projection and goes on as far as it can alone.
The inner norm only scales a row, so a block's share of the logits is a sum that needs no other block: what is left
to the last program that arrives for a pair is to add the shares in ascending order, scale, and read the classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from guardengine.kernels.gpu.arrival import is_last_to_arrive
from guardengine.kernels.gpu.linear_config import DTYPES
from guardengine.kernels.gpu.workspace import Workspace, allocate_workspace

_BLOCK_M = 16  # rows of a program, always: one and the same code for any number of rows
_BLOCK_N = 16  # columns of a pre-projection
_MERGED = 32  # blocks whose shares are loaded at a time
_MOST_ROWS = 512  # of a launch of `guard_heads`


class ClassifierSizes(NamedTuple):
    """Classes of each classifier, in the order of their logits."""

    response_risks: int
    response_categories: int
    query_risks: int
    query_categories: int


def guard_heads(
    x: Tensor,
    final_norm: Tensor,
    pre: Tensor,
    inner_norm: Tensor,
    response_head: Tensor,
    query_head: Tensor,
    eps: float,
) -> Tensor:
    """Compute the four classifiers' logits of each row from the last layer's residual stream.

    h = rms_norm(x);  r = rms_norm(pre_response h), logits = response_head r;  the query pair likewise

    Args:
        x: [W, E], float32, float16 or bfloat16. Only h times its norm's weight is rounded to that dtype.
        final_norm: [E], like all weights in x's dtype.
        pre: [2G, E], the response pair's rows first.
        inner_norm: [2, G], response then query.
        response_head: [risks + categories, G].
        query_head: [risks + categories, G].
        eps: The norms'.

    Returns:
        [W, C] float32: the response pair's logits, then the query pair's.

    Raises:
        ValueError: For other shapes and dtypes.

    Source: Qwen3Guard Technical Report (arXiv 2510.14276) eq. 3, with RMSNorm where it writes LayerNorm.
    """
    response, query = response_head.shape[0], query_head.shape[0]
    sizes = ClassifierSizes(response, 0, query, 0)  # where risks end does not matter to logits
    num_rows = x.shape[0]
    logits = torch.empty(num_rows, response + query, dtype=torch.float32, device=x.device)
    needs = guard_scores_scratch(min(num_rows, _MOST_ROWS), pre.shape[0] // 2, sizes)
    workspace = allocate_workspace({}, x.device, others=[needs])
    for start in range(0, num_rows, _MOST_ROWS):
        end = min(start + _MOST_ROWS, num_rows)
        _launch(
            x[start:end], None, None, final_norm, pre, inner_norm, response_head, query_head, eps, sizes,
            logits[start:end], workspace,
        )  # fmt: skip
    return logits


def guard_scores(
    x: Tensor,
    label_index: Tensor,
    num_labels: Tensor,
    final_norm: Tensor,
    pre: Tensor,
    inner_norm: Tensor,
    response_head: Tensor,
    query_head: Tensor,
    eps: float,
    sizes: ClassifierSizes,
    *,
    out: Tensor,
    workspace: Workspace,
) -> Tensor:
    """Classify the wanted rows and read the classes, in one launch.

    out[w] = logits [C] | probabilities [C], of each classifier by itself | the likeliest class of each classifier,
    the first of equals, or -1 where a logit is not finite, as a float [4]

    Args:
        x: [T, E], not normed; float32, float16 or bfloat16.
        label_index: [W] int32 or int64, rows of x, valid up to num_labels.
        num_labels: [] or [1], an integer in device memory, at most W.
        final_norm: [E]; this and the next four are what `guard_heads` takes.
        pre: [2G, E].
        inner_norm: [2, G].
        response_head: [risks + categories, G].
        query_head: [risks + categories, G].
        eps: The norms'.
        sizes: Classes of each classifier.
        out: [W, 2C + 4] float32, written in its first num_labels rows.
        workspace: With room for `guard_scores_scratch`.

    Returns:
        out.

    Raises:
        ValueError: For other shapes and dtypes, and where the workspace does not fit.
    """
    if label_index.shape != out.shape[:1] or num_labels.numel() != 1:
        raise ValueError(
            f"guard_scores: label_index is {tuple(label_index.shape)}, num_labels {tuple(num_labels.shape)}, "
            f"out {tuple(out.shape)}"
        )
    return _launch(
        x, label_index, num_labels, final_norm, pre, inner_norm, response_head, query_head, eps, sizes, out, workspace
    )  # fmt: skip


def guard_scores_scratch(num_rows: int, inner_size: int, sizes: ClassifierSizes) -> tuple[int, int]:
    """What `guard_scores` needs of a workspace.

    Args:
        num_rows: Wanted rows at most.
        inner_size: G.
        sizes: Classes of each classifier.

    Returns:
        Partial sums (float32 numbers), and counters.
    """
    tiles = 2 * triton.cdiv(num_rows, _BLOCK_M)
    return tiles * triton.cdiv(inner_size, _BLOCK_N) * _BLOCK_M * _share_width(sizes), tiles


def _share_width(sizes: ClassifierSizes) -> int:
    """Columns of a block's share: a pair's logits, and the sum of squares in the last."""
    most = max(sizes.response_risks + sizes.response_categories, sizes.query_risks + sizes.query_categories)
    return int(triton.next_power_of_2(max(most + 1, 16)))


def _launch(
    x: Tensor,
    label_index: Tensor | None,
    num_labels: Tensor | None,
    final_norm: Tensor,
    pre: Tensor,
    inner_norm: Tensor,
    response_head: Tensor,
    query_head: Tensor,
    eps: float,
    sizes: ClassifierSizes,
    out: Tensor,
    workspace: Workspace,
) -> Tensor:
    _check(x, final_norm, pre, inner_norm, response_head, query_head, sizes, out, label_index is not None)
    if out.shape[0] == 0:
        return out
    num_rows, (inner_size, width) = out.shape[0], (inner_norm.shape[1], x.shape[1])
    partials, counters = workspace.take(*guard_scores_scratch(num_rows, inner_size, sizes))
    # float32 is multiplied without tensor cores, out of registers: wide tiles do not fit them.
    block_k = min(32 if x.dtype == torch.float32 else 256, max(16, triton.next_power_of_2(width)))
    grid = (triton.cdiv(num_rows, _BLOCK_M), triton.cdiv(inner_size, _BLOCK_N), 2)
    _guard_scores_kernel[grid](
        x,
        x if label_index is None else label_index,
        x if num_labels is None else num_labels,
        final_norm,
        pre,
        inner_norm,
        response_head,
        query_head,
        out,
        partials,
        counters,
        num_rows,
        inner_size,
        width,
        x.stride(0),
        out.stride(0),
        eps,
        IS_READ_OUT=label_index is not None,
        EVEN_K=width % block_k == 0,
        RESPONSE_RISKS=sizes.response_risks,
        RESPONSE_LOGITS=response_head.shape[0],
        QUERY_RISKS=sizes.query_risks,
        QUERY_LOGITS=query_head.shape[0],
        SHARE=_share_width(sizes),
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=block_k,
        MERGED=_MERGED,
        num_warps=4,
        num_stages=4,
        enable_fp_fusion=False,  # compiled once with readout and once without, which have to round alike
    )
    return out


def _check(
    x: Tensor,
    final_norm: Tensor,
    pre: Tensor,
    inner_norm: Tensor,
    response_head: Tensor,
    query_head: Tensor,
    sizes: ClassifierSizes,
    out: Tensor,
    is_read_out: bool,
) -> None:
    width, inner_size = x.shape[1], inner_norm.shape[1]
    response, query = sizes[0] + sizes[1], sizes[2] + sizes[3]
    expected = (
        ("final_norm", final_norm, (width,)),
        ("pre", pre, (2 * inner_size, width)),
        ("inner_norm", inner_norm, (2, inner_size)),
        ("response_head", response_head, (response, inner_size)),
        ("query_head", query_head, (query, inner_size)),
    )
    for name, tensor, shape in expected:
        if tensor.shape != shape or tensor.dtype != x.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"guard heads: {name} is {tuple(tensor.shape)} {tensor.dtype}; contiguous {shape} {x.dtype} is needed"
            )
    if x.dtype not in DTYPES or x.stride(1) != 1:
        raise ValueError(f"guard heads: x is {x.dtype} with strides {x.stride()}; contiguous rows are needed")
    columns = 2 * (response + query) + 4 if is_read_out else response + query
    if out.shape[1] != columns or out.dtype != torch.float32 or out.stride(1) != 1:
        raise ValueError(f"guard heads: out is {tuple(out.shape)} {out.dtype} for {response + query} logits")


@triton.jit(do_not_specialize=["num_rows"])
def _guard_scores_kernel(
    x_ptr,
    label_index_ptr,
    num_labels_ptr,
    final_norm_ptr,
    pre_ptr,
    inner_norm_ptr,
    response_ptr,
    query_ptr,
    out_ptr,
    partials_ptr,
    counters_ptr,
    num_rows,
    inner_size,
    width,
    stride_x,
    stride_out,
    eps,
    IS_READ_OUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    RESPONSE_RISKS: tl.constexpr,
    RESPONSE_LOGITS: tl.constexpr,
    QUERY_RISKS: tl.constexpr,
    QUERY_LOGITS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Sixteen wanted rows, sixteen columns of one pair's pre-projection: program (rows, block, pair)."""
    tile_m, block, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_col = cols < inner_size
    weight_rows = (pair * inner_size + tl.minimum(cols, inner_size - 1)).to(tl.int64)[:, None] * width
    if IS_READ_OUT:
        num_rows = tl.minimum(tl.load(num_labels_ptr).to(tl.int32), num_rows)
    if tile_m * BLOCK_M < num_rows:
        wanted = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        is_row = (wanted < num_rows)[:, None]
        rows = wanted.to(tl.int64)
        if IS_READ_OUT:
            rows = tl.load(label_index_ptr + wanted, mask=wanted < num_rows, other=0).to(tl.int64)
        classes = tl.arange(0, SHARE)
        inner_norm = tl.load(inner_norm_ptr + pair * inner_size + cols, mask=is_col, other=0.0).to(tl.float32)
        head_offsets = classes[:, None] * inner_size + cols[None, :]
        if pair == 0:
            is_head = (classes < RESPONSE_LOGITS)[:, None] & is_col[None, :]
            head = tl.load(response_ptr + head_offsets, mask=is_head, other=0.0).to(tl.float32)
        else:
            is_head = (classes < QUERY_LOGITS)[:, None] & is_col[None, :]
            head = tl.load(query_ptr + head_offsets, mask=is_head, other=0.0).to(tl.float32)

        projected = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        squares = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
        for start in range(0, width, BLOCK_K):
            ks = start + tl.arange(0, BLOCK_K)
            x_ptrs = x_ptr + rows[:, None] * stride_x + ks[None, :]
            pre_ptrs = pre_ptr + weight_rows + ks[None, :]
            if EVEN_K:
                x = tl.load(x_ptrs, mask=is_row, other=0.0)
                weight = tl.load(pre_ptrs)
                norm = tl.load(final_norm_ptr + ks)
            else:
                is_k = ks < width
                x = tl.load(x_ptrs, mask=is_row & is_k[None, :], other=0.0)
                weight = tl.load(pre_ptrs, mask=is_k[None, :], other=0.0)
                norm = tl.load(final_norm_ptr + ks, mask=is_k, other=0.0)
            squares = tl.dot(x, tl.trans(x), squares, input_precision="ieee")
            projected = tl.dot(x * norm[None, :], tl.trans(weight), projected, input_precision="ieee")
        is_diagonal = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_M)[None, :]
        square_sum = tl.sum(tl.where(is_diagonal, squares, 0.0), axis=1)
        projected *= tl.rsqrt(square_sum / width + eps)[:, None]
        projected = tl.where(is_col[None, :], projected, 0.0)

        # This block's share: of every logit before the inner norm's scale, and of the sum of squares.
        share = tl.dot(projected * inner_norm[None, :], tl.trans(head), input_precision="ieee")
        inner_squares = tl.sum(projected * projected, axis=1)
        share = tl.where((classes == SHARE - 1)[None, :], inner_squares[:, None], share)

        SIZE: tl.constexpr = BLOCK_M * SHARE
        tile, num_blocks = tile_m * 2 + pair, tl.num_programs(1)
        shares_ptr = partials_ptr + tile.to(tl.int64) * num_blocks * SIZE
        offsets = tl.arange(0, BLOCK_M)[:, None] * SHARE + classes[None, :]
        tl.store(shares_ptr + block * SIZE + offsets, share, cache_modifier=".cg")
        if is_last_to_arrive(counters_ptr + tile, num_blocks):
            total = tl.zeros((BLOCK_M, SHARE), tl.float32)
            for first in range(0, num_blocks, MERGED):
                blocks = first + tl.arange(0, MERGED)
                shares = tl.load(
                    shares_ptr + blocks[:, None, None] * SIZE + offsets[None, :, :],
                    mask=(blocks < num_blocks)[:, None, None],
                    other=0.0,
                    cache_modifier=".cg",
                )
                total += tl.sum(shares, axis=0)
            inner_square_sum = tl.sum(tl.where((classes == SHARE - 1)[None, :], total, 0.0), axis=1)
            logits = total * tl.rsqrt(inner_square_sum / inner_size + eps)[:, None]

            num_risks = tl.where(pair == 0, RESPONSE_RISKS, QUERY_RISKS)
            num_logits = tl.where(pair == 0, RESPONSE_LOGITS, QUERY_LOGITS)
            out_rows = out_ptr + wanted.to(tl.int64) * stride_out
            out_ptrs = out_rows[:, None] + (pair * RESPONSE_LOGITS + classes)[None, :]
            is_logit = is_row & (classes < num_logits)[None, :]
            tl.store(out_ptrs, logits, mask=is_logit)
            if IS_READ_OUT:
                LOGITS: tl.constexpr = RESPONSE_LOGITS + QUERY_LOGITS
                risk_probs, risk = _read_out(logits, classes, 0, num_risks, SHARE)
                category_probs, category = _read_out(logits, classes, num_risks, num_logits, SHARE)
                probs = tl.where((classes < num_risks)[None, :], risk_probs, category_probs)
                tl.store(out_ptrs + LOGITS, probs, mask=is_logit)
                class_ptrs = out_rows + 2 * LOGITS + 2 * pair
                tl.store(class_ptrs, risk.to(tl.float32), mask=wanted < num_rows)
                tl.store(class_ptrs + 1, category.to(tl.float32), mask=wanted < num_rows)


@triton.jit
def _read_out(logits, classes, first, end, SHARE: tl.constexpr):
    """Softmax over one classifier's columns, and its likeliest class: the first of equals."""
    is_class = ((classes >= first) & (classes < end))[None, :]
    scores = tl.where(is_class, logits, float("-inf"))
    top = tl.max(scores, axis=1)[:, None]
    powers = tl.where(is_class, tl.exp(scores - top), 0.0)
    likeliest = tl.min(tl.where(scores == top, classes[None, :], SHARE), axis=1) - first
    # x * 0 is NaN where x is infinite or NaN. Without this, nothing would be likeliest among NaNs.
    broken = tl.sum(tl.where(is_class, logits * 0.0, 0.0), axis=1)
    return powers / tl.sum(powers, axis=1)[:, None], tl.where(broken == 0.0, likeliest, -1)
