"""Operators on rows, for steps of many rows: one program computes a row, or a block of one.

A row's result depends on the row alone: no program sees two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from guardengine.kernels.gpu.linear_config import DTYPES

_MAX_WIDTH = 16384  # of a row that one program holds in registers
_COLUMNS = 1024  # of a row of `silu_and_mul`, a program


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale rows to unit root mean square: out = x / sqrt(mean(x²) + eps) * weight, over the last axis.

    Args:
        x: [..., n], n <= 16384, float32, float16 or bfloat16; computed in float32, one rounding.
        weight: [n], of any of these dtypes.
        eps: Added to the mean.

    Returns:
        [..., n], in x's dtype.

    Raises:
        ValueError: For other shapes and dtypes.

    Source: Zhang & Sennrich 2019, eq. 4.
    """
    _check("rms_norm", x, weight)
    rows, out = _rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm(rows, None, weight, eps, None, out)
    return out


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and norm the sum.

    Args:
        x: [T, E], E <= 16384, of a dtype of `rms_norm`.
        residual: [T, E], in x's dtype.
        weight: [E], the norm's.
        eps: The norm's.

    Returns:
        (rms_norm(s), s) with s = x + residual, rounded: both [T, E] in x's dtype.

    Raises:
        ValueError: For other shapes and dtypes.
    """
    _check("fused_add_rms_norm", x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"fused_add_rms_norm: x is {tuple(x.shape)} {x.dtype}, residual {tuple(residual.shape)} {residual.dtype}"
        )
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _norm(_rows(x), _rows(residual), weight, eps, total, out)
    return out, total


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """out = silu(gate) * up.

    Args:
        gate_up: [T, 2F], gate's columns first; float32, float16 or bfloat16.

    Returns:
        [T, F], in gate_up's dtype.

    Raises:
        ValueError: For another dtype.

    Source: Shazeer 2020 (SwiGLU).
    """
    if gate_up.dtype not in DTYPES:
        raise ValueError(f"silu_and_mul: float32, float16 or bfloat16 is needed, not {gate_up.dtype}")
    gate_up = _rows(gate_up)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, width)
    if num_rows:
        block = min(_COLUMNS, triton.next_power_of_2(width))
        _silu_and_mul_kernel[(num_rows, triton.cdiv(width, block))](
            gate_up, out, width, gate_up.stride(0), BLOCK=block, num_warps=4
        )
    return out


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, total: Tensor | None, out: Tensor
) -> None:
    num_rows, width = x.shape
    if num_rows == 0:
        return
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(num_rows,)](
        x,
        x if residual is None else residual,
        weight,
        out if total is None else total,
        out,
        width,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        IS_SUM=residual is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 8),
    )


def _rows(x: Tensor) -> Tensor:
    """x as [rows, n] with the numbers of a row side by side. Copies only where they are not yet."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _check(operator: str, x: Tensor, weight: Tensor) -> None:
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:
        raise ValueError(
            f"{operator}: float32, float16 or bfloat16 is needed, not {x.dtype} and {weight.dtype}"
        )
    if weight.shape != x.shape[-1:] or not weight.is_contiguous():
        raise ValueError(f"{operator}: weight is {tuple(weight.shape)}, x {tuple(x.shape)}")
    if x.shape[-1] > _MAX_WIDTH:
        raise ValueError(f"{operator}: a row of {x.shape[-1]} is over {_MAX_WIDTH}")


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    total_ptr,
    out_ptr,
    width,
    stride_x,
    stride_residual,
    eps,
    IS_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: program (row). With IS_SUM residual is added first, and the sum stored as it is rounded."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    is_inside = cols < width
    x = tl.load(x_ptr + row * stride_x + cols, mask=is_inside, other=0.0).to(tl.float32)
    if IS_SUM:
        residual = tl.load(residual_ptr + row * stride_residual + cols, mask=is_inside, other=0.0)
        total = (x + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * width + cols, total, mask=is_inside)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=is_inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    tl.store(out_ptr + row * width + cols, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def _silu_and_mul_kernel(gate_up_ptr, out_ptr, width, stride_row, BLOCK: tl.constexpr):
    """A block of one row: program (row, block)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = cols < width
    gate = tl.load(gate_up_ptr + row * stride_row + cols, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride_row + width + cols, mask=is_inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * width + cols, out.to(out_ptr.dtype.element_ty), mask=is_inside)
