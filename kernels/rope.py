"""Rotary position embeddings in plain PyTorch: the table that every backend reads, and the formula."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(head_dim: int, theta: float, num_positions: int) -> Tensor:
    """Cosines and sines of RoPE's angles, position * theta^(-2j/D).

    Args:
        head_dim: D, even.
        theta: The base of the angles' geometric series.
        num_positions: From 0 on.

    Returns:
        [num_positions, D] float32: D/2 cosines, then D/2 sines.

    Source: Su 2021; Qwen3's (half, half) pairing, see `apply_rope`.
    """
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate pair (j, j + D/2) of each head by its angle: (a cos - b sin, b cos + a sin).

    Args:
        x: [T, heads, D] float32.
        cos_sin: [T, D], the row of `rope_table` at each token's position.

    Returns:
        [T, heads, D] float32.
    """
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
