"""Rounding to int8: the formulas, in plain PyTorch. Backends must round to the same integers.

Shapes follow the dimension key of guardengine.kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCHEMES = ("int8", "w8a8")
GROUP_SIZE = 128  # weights of a row that share a scale under "int8"; kGroup in csrc/kernels.h
_LEAST_MAGNITUDE = 1e-35  # 127 / that is still finite in float32


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight matrix in int8: weight[n, k] = values[n, k] * scales[n, k // group_size]."""

    values: Tensor  # [out, in] int8
    scales: Tensor  # [out, groups] float32
    group_size: int
    rounds_rows: bool  # w8a8: the rows multiplied with it are rounded to int8 too

    def dequantized(self) -> Tensor:
        """[out, in] float32."""
        scales = self.scales.repeat_interleave(self.group_size, dim=1)[:, : self.values.shape[1]]
        return self.values.float() * scales


def quantize_weight(weight: Tensor, scheme: str) -> QuantizedWeight:
    """Round a matrix to int8: a scale for every GROUP_SIZE weights of a row ("int8"), or for a row ("w8a8").

    Args:
        weight: [out, in], any floating dtype.
        scheme: One of SCHEMES.

    Raises:
        ValueError: For another scheme.
    """
    check_scheme(scheme)
    size = GROUP_SIZE if scheme == "int8" else weight.shape[1]
    parts = [quantize_rows(part) for part in weight.split(size, dim=1)]
    values, scales = zip(*parts, strict=True)
    return QuantizedWeight(torch.cat(values, dim=1), torch.stack(scales, dim=1), size, scheme == "w8a8")


def check_scheme(scheme: str) -> None:
    """Raises ValueError for what is not in `SCHEMES`."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r}: choose one of {', '.join(SCHEMES)}")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round the last axis to int8: x ~ q * scale, scale = max |x| / 127, q = x * (127 / max |x|), ties to even.

    Rows below 1e-35 become zeros; a value that is not finite makes its row's scale NaN.

    Args:
        x: [..., n], any floating dtype.

    Returns:
        q [..., n] int8, and scale [...] float32.
    """
    x = x.float()
    top = x.nan_to_num(0.0).abs().amax(-1)
    broken = (x * 0.0).sum(-1)  # NaN where something is not finite
    # One rounding: `127.0 / top` with a Python number is its reciprocal times 127 in torch.
    inverse = torch.where(top > _LEAST_MAGNITUDE, top.new_tensor(127.0) / top, 0.0)
    q = torch.round(x * inverse[..., None]).nan_to_num(0.0).clamp(-127, 127).to(torch.int8)
    return q, top / 127.0 + broken
