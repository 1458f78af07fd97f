"""Matrix products of up to 64 rows: one Triton kernel that streams a weight matrix once, with what stands around it.

At so few rows a product takes as long as its weights take to arrive, and a launch about as long as reading 4 MB. So
the RMSNorm before a matrix and the activation or addition after it are variants of one kernel, not launches.

A row's result is the same bits whatever else is in the batch. What fixes it is the order of additions: BLOCK_K and
SPLIT_K belong to the weight's shape, never to the number of rows; a sum's parts are added in ascending order by
whichever program arrives last; a row's sum of squares is accumulated as a product, x xᵀ, in the order of all
products, not as a reduction whose order would follow from the layout of a tile. torch's own product may be faster
for some shape and number of rows, and is not used for that: it picks another kernel, that is, another order, for
another number of rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from guardengine.kernels import SMALL_ROWS
from guardengine.kernels.gpu.arrival import is_last_to_arrive
from guardengine.kernels.gpu.linear_config import (
    DTYPES,
    GATED,
    NORMED,
    PLAIN,
    SUMMED,
    LinearConfig,
    default_config,
)
from guardengine.kernels.gpu.workspace import Workspace
from guardengine.kernels.quantization import QuantizedWeight


def linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """out = x weightᵀ, with sums in float32 and one rounding.

    Args:
        x: [T, in], float32, float16 or bfloat16. Up to 64 rows are independent of each other; more are torch's product.
        weight: [out, in], in x's dtype.

    Returns:
        [T, out], in x's dtype.

    Raises:
        ValueError: For a quantized weight, another dtype, or shapes that do not fit.
    """
    if isinstance(weight, QuantizedWeight):
        raise ValueError(
            "the Triton backend multiplies with matrices in the model's dtype only: load with quantization=None, "
            "or take backend='cpu' for int8 weights"
        )
    if x.shape[0] > SMALL_ROWS:
        return F.linear(x, weight)
    # Sums in one part: the contract has no scratch memory, and filling some with zeros would be a second launch.
    config = default_config(PLAIN, weight.shape, dtype=x.dtype, num_sms=_num_sms(x), max_split=1)
    return _launch(PLAIN, x, weight, x.new_empty(x.shape[0], weight.shape[0]), None, config)


def norm_linear(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, *, out: Tensor | None = None, workspace: Workspace
) -> Tensor:
    """out = rms_norm(x, norm, eps) weightᵀ, in one launch.

    x * norm is rounded to x's dtype; its scale, 1 / sqrt(mean(x²) + eps), is applied to the sum.

    Args:
        x: [T, in], T <= 64, float32, float16 or bfloat16.
        norm: [in], the norm's weight; in x's dtype.
        eps: The norm's.
        weight: [out, in], in x's dtype.
        out: [T, out], to be written; overlaps no input. None: allocated.
        workspace: For this operator and shape; no other queue of launches may use it meanwhile.

    Returns:
        out.

    Raises:
        ValueError: For other shapes and dtypes, and where the workspace does not fit.
    """
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    return _launch(NORMED, x, weight, out, workspace, workspace.config(NORMED, weight), norm, eps)


def norm_gate_up(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, *, out: Tensor | None = None, workspace: Workspace
) -> Tensor:
    """out = silu(gate) * up of rms_norm(x, norm, eps) weightᵀ, in one launch. Gate and up are not rounded in between.

    Args:
        x: [T, in], T <= 64, float32, float16 or bfloat16.
        norm: [in], the norm's weight; in x's dtype.
        eps: The norm's.
        weight: [2F, in], gate's rows first; in x's dtype.
        out: [T, F], to be written; overlaps no input. None: allocated.
        workspace: For this operator and shape; no other queue of launches may use it meanwhile.

    Returns:
        out.

    Raises:
        ValueError: For other shapes and dtypes, and where the workspace does not fit.
    """
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0] // 2)
    return _launch(GATED, x, weight, out, workspace, workspace.config(GATED, weight), norm, eps)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor, *, workspace: Workspace) -> Tensor:
    """residual += x weightᵀ, in place and in one launch. The sum is rounded once, with residual added.

    Args:
        x: [T, in], T <= 64, float32, float16 or bfloat16.
        weight: [out, in], in x's dtype.
        residual: [T, out], in x's dtype; overlaps neither x nor weight.
        workspace: For this operator and shape; no other queue of launches may use it meanwhile.

    Returns:
        residual.

    Raises:
        ValueError: For other shapes and dtypes, and where the workspace does not fit.
    """
    return _launch(SUMMED, x, weight, residual, workspace, workspace.config(SUMMED, weight))


def _launch(
    operator: str,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    workspace: Workspace | None,
    config: LinearConfig,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    num_rows, inner = x.shape
    columns = out.shape[1]
    _check(operator, x, weight, out, norm)
    if num_rows == 0:
        return out
    block_m = config.row_tile(num_rows)
    tiles_m, tiles_n = triton.cdiv(num_rows, block_m), triton.cdiv(columns, config.block_n)
    partials = counters = out  # not looked at where sums have one part
    if config.split_k > 1:
        if workspace is None:
            raise ValueError(f"{operator}: sums in {config.split_k} parts need a workspace")
        partials, counters = workspace.take(*config.scratch(operator, columns, num_rows))
    options: dict[str, int] = {}
    if operator == GATED and config.num_warps == 4:
        # As many as leave room for three programs. By itself ptxas aims at 64 on sm_100 and sm_120, and spills.
        options["maxnreg"] = 168
    _linear_kernel[(tiles_m, config.split_k, tiles_n)](
        x,
        weight if norm is None else norm,
        weight,
        out,
        partials,
        counters,
        num_rows,
        columns,
        inner,
        x.stride(0),
        out.stride(0),
        eps,
        IS_NORMED=norm is not None,
        IS_GATED=operator == GATED,
        IS_SUMMED=operator == SUMMED,
        EVEN_K=inner % config.block_k == 0,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT_K=config.split_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,  # compiled once for 16 and once for 32 rows, which have to round alike
        **options,
    )
    return out


def _check(operator: str, x: Tensor, weight: Tensor, out: Tensor, norm: Tensor | None) -> None:
    tensors = [("x", x), ("weight", weight), ("out", out)] + ([] if norm is None else [("norm", norm)])
    if x.dtype not in DTYPES or any(tensor.dtype != x.dtype for _, tensor in tensors):
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors)
        raise ValueError(f"{operator}: one dtype of float32, float16, bfloat16 is needed, not {found}")
    if x.shape[0] > SMALL_ROWS:
        raise ValueError(f"{operator}: {x.shape[0]} rows are over {SMALL_ROWS}")
    halves = 2 if operator == GATED else 1
    expected = {
        "weight": (halves * out.shape[1], x.shape[1]),
        "out": (x.shape[0], weight.shape[0] // halves),
        "norm": (x.shape[1],),
    }
    for name, tensor in tensors[1:]:
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{operator}: {name} is {tuple(tensor.shape)}, {expected[name]} fits x {tuple(x.shape)}"
            )
    if not weight.is_contiguous() or any(tensor.stride(-1) != 1 for _, tensor in tensors):
        raise ValueError(f"{operator}: weight must be contiguous, and the rows of x and out")


def _num_sms(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    out_ptr,
    partials_ptr,
    counters_ptr,
    num_rows,
    columns,
    inner,
    stride_x,
    stride_out,
    eps,
    IS_NORMED: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_SUMMED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """One tile of rows times one block of columns over one part of the inner dimension: program (m, part, n).

    Tiles of rows come first in the launch's order: they read the same weights, which then still are in L2.
    """
    tile_m, part, tile_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = (rows < num_rows)[:, None]
    part_size = tl.cdiv(tl.cdiv(inner, BLOCK_K), SPLIT_K) * BLOCK_K
    begin = part * part_size
    end = tl.minimum(begin + part_size, inner)

    # Columns past the end read the last one and are not stored: no mask stands in the way of wide loads.
    weight_rows = tl.minimum(cols, columns - 1).to(tl.int64)[:, None] * inner

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    x_rows = x_ptr + rows[:, None] * stride_x
    if IS_NORMED:
        first = begin + tl.arange(0, BLOCK_K)
        norm = tl.load(norm_ptr + first, mask=first < inner, other=0.0)
    for start in range(begin, end, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        if EVEN_K:
            x = tl.load(x_rows + ks[None, :], mask=is_row, other=0.0)
            weight = tl.load(weight_ptr + weight_rows + ks[None, :])
        else:
            is_k = (ks < inner)[None, :]
            x = tl.load(x_rows + ks[None, :], mask=is_row & is_k, other=0.0)
            weight = tl.load(weight_ptr + weight_rows + ks[None, :], mask=is_k, other=0.0)
        if IS_NORMED:
            # Only the diagonal is wanted. What is off it may be NaN, from a row that is padding.
            squares = tl.dot(x, tl.trans(x), squares, input_precision="ieee")
            x = x * norm[None, :]
            # For the next tile: too narrow for the copies that run ahead of the loop by themselves.
            norm = tl.load(norm_ptr + BLOCK_K + ks, mask=BLOCK_K + ks < inner, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
        if IS_GATED:
            up_ptrs = weight_ptr + columns * inner + weight_rows + ks[None, :]
            up_weight = (
                tl.load(up_ptrs) if EVEN_K else tl.load(up_ptrs, mask=(ks < inner)[None, :], other=0.0)
            )
            up = tl.dot(x, tl.trans(up_weight), up, input_precision="ieee")

    square_sum = tl.sum(
        tl.where(tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_M)[None, :], squares, 0.0), axis=1
    )
    if SPLIT_K == 1:
        _finish(
            acc, up, square_sum, out_ptr, rows, cols, is_row, columns, inner, stride_out, eps,
            IS_NORMED, IS_GATED, IS_SUMMED,
        )  # fmt: skip
    else:
        # A part's numbers, in one piece: products, with IS_GATED up's products, with IS_NORMED sums of squares.
        PIECE: tl.constexpr = BLOCK_M * (BLOCK_N * (2 if IS_GATED else 1) + (1 if IS_NORMED else 0))
        tile = tile_n * tl.num_programs(0) + tile_m
        tile_rows, tile_cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        offsets = tile_rows[:, None] * BLOCK_N + tile_cols[None, :]
        pieces_ptr = partials_ptr + tile.to(tl.int64) * (SPLIT_K * PIECE)
        piece_ptr = pieces_ptr + part * PIECE
        tl.store(piece_ptr + offsets, acc, mask=is_row, cache_modifier=".cg")
        if IS_GATED:
            tl.store(piece_ptr + BLOCK_M * BLOCK_N + offsets, up, mask=is_row, cache_modifier=".cg")
        if IS_NORMED:
            tl.store(
                piece_ptr + PIECE - BLOCK_M + tile_rows,
                square_sum,
                mask=rows < num_rows,
                cache_modifier=".cg",
            )
        if is_last_to_arrive(counters_ptr + tile, SPLIT_K):
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            square_sum = tl.zeros((BLOCK_M,), tl.float32)
            for index in tl.static_range(SPLIT_K):
                piece_ptr = pieces_ptr + index * PIECE
                acc += tl.load(piece_ptr + offsets, mask=is_row, other=0.0, cache_modifier=".cg")
                if IS_GATED:
                    up += tl.load(
                        piece_ptr + BLOCK_M * BLOCK_N + offsets, mask=is_row, other=0.0, cache_modifier=".cg"
                    )
                if IS_NORMED:
                    square_sum += tl.load(
                        piece_ptr + PIECE - BLOCK_M + tile_rows,
                        mask=rows < num_rows,
                        other=0.0,
                        cache_modifier=".cg",
                    )
            _finish(
                acc, up, square_sum, out_ptr, rows, cols, is_row, columns, inner, stride_out, eps,
                IS_NORMED, IS_GATED, IS_SUMMED,
            )  # fmt: skip


@triton.jit
def _finish(
    acc, up, square_sum, out_ptr, rows, cols, is_row, columns, inner, stride_out, eps,
    IS_NORMED: tl.constexpr, IS_GATED: tl.constexpr, IS_SUMMED: tl.constexpr,
):  # fmt: skip
    """Scale the sums, apply what follows the product, and store a tile of the result."""
    if IS_NORMED:
        scale = tl.rsqrt(square_sum / inner + eps)[:, None]
        acc *= scale
        up *= scale
    if IS_GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    out_ptrs = out_ptr + rows[:, None] * stride_out + cols[None, :]
    is_inside = is_row & (cols < columns)[None, :]
    if IS_SUMMED:
        acc += tl.load(out_ptrs, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_inside)
