"""What the tests of native operators share: numbers to compute with, and how close a result must be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from guardengine.kernels import BACKENDS

HOST_BACKENDS = tuple(name for name in BACKENDS if name != "triton")  # those that run without a GPU


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def assert_close_as_torch(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Error against float64 at most twice plain PyTorch's at this dtype, plus one rounding of the largest value."""
    assert actual.shape == plain.shape
    assert actual.dtype == plain.dtype
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item()
    allowed += torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"error {error:.3g} is over {allowed:.3g}"
