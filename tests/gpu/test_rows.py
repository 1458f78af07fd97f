"""Triton's operators on rows against the reference: as close as plain PyTorch, and rows alone in the world."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from launches import counted
from native_ops import assert_close_as_torch, rand
from pairwise import grid
from torch import Tensor

from guardengine.kernels import gpu as ops
from guardengine.kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 192), (3, 5, 100), (2, 1025)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = rand(*shape, dtype=dtype, scale=3), 1 + rand(shape[-1], dtype=dtype, scale=0.1)
    x64 = x.double()
    exact = x64 / (x64.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert_close_as_torch(ops.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS), exact)


def test_rms_norm_eps_is_inside_the_root() -> None:
    out = ops.rms_norm(torch.full((1, 4), 1e-3), torch.ones(4), 3e-6)
    assert out.mean().item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_add_rms_norm(dtype: torch.dtype) -> None:
    x, residual, weight = rand(5, 96, dtype=dtype), rand(5, 96, dtype=dtype, seed=1), rand(96, dtype=dtype)
    before = x.clone(), residual.clone()
    normed, total = ops.fused_add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.rms_norm(total, weight, EPS))  # of the rounded sum
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@grid(width=[48, 1100], scale=[0.01, 4, 60], dtype=DTYPES)
def test_silu_and_mul(width: int, scale: float, dtype: torch.dtype) -> None:
    gate_up = rand(3, 2 * width, dtype=dtype, scale=scale)
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate) * up
    assert_close_as_torch(ops.silu_and_mul(gate_up), reference.silu_and_mul(gate_up), exact)


def test_silu_of_extremes() -> None:
    gate = torch.tensor([0.0, -0.0, 200.0, -200.0, 3e38, -3e38, math.inf, math.nan, 88.0, -88.0, -100.0])
    gate_up = torch.cat((gate, torch.ones(11)))[None]
    torch.testing.assert_close(ops.silu_and_mul(gate_up), reference.silu_and_mul(gate_up), equal_nan=True)


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: ops.rms_norm(x, rand(x.shape[-1], dtype=x.dtype), EPS),
    "fused_add_rms_norm": lambda x: torch.cat(
        ops.fused_add_rms_norm(x, x, rand(x.shape[-1], dtype=x.dtype), EPS), 1
    ),
    "silu_and_mul": lambda x: ops.silu_and_mul(x),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    operator, x = OPERATORS[name], rand(6, 72, dtype=torch.bfloat16)
    whole = operator(x)
    poisoned = x.clone()
    poisoned[[0, 2, 5]] = torch.nan
    assert torch.equal(operator(poisoned)[[1, 3, 4]], whole[[1, 3, 4]])
    for row in range(6):
        assert torch.equal(operator(x[row : row + 1]), whole[row : row + 1])


@pytest.mark.parametrize("name", OPERATORS)
def test_rows_need_not_lie_side_by_side(name: str) -> None:
    wide = rand(5, 200, dtype=torch.bfloat16)
    part = wide[::2, 16:88]
    assert torch.equal(OPERATORS[name](part), OPERATORS[name](part.contiguous()))
    columns = wide.T[:72]  # a row's numbers far apart
    assert torch.equal(OPERATORS[name](columns), OPERATORS[name](columns.contiguous()))


@pytest.mark.parametrize("name", OPERATORS)
def test_no_rows(name: str) -> None:
    assert OPERATORS[name](torch.empty(0, 72)).shape[0] == 0


def test_each_is_one_launch() -> None:
    x, weight = rand(3, 64), rand(64)
    for operator in (
        lambda: ops.rms_norm(x, weight, EPS),
        lambda: ops.fused_add_rms_norm(x, x, weight, EPS),
        lambda: ops.silu_and_mul(x),
    ):
        assert counted(operator) == (1, [])


def test_what_is_not_supported_is_said() -> None:
    x, weight = rand(2, 64), rand(64)
    with pytest.raises(ValueError, match="float64"):
        ops.rms_norm(x.double(), weight, EPS)
    with pytest.raises(ValueError, match="float64"):
        ops.silu_and_mul(x.double())
    with pytest.raises(ValueError, match=r"\(63,\).*\(2, 64\)"):
        ops.rms_norm(x, weight[:63], EPS)
    with pytest.raises(ValueError, match="residual"):
        ops.fused_add_rms_norm(x, x[:1], weight, EPS)
    with pytest.raises(ValueError, match="16384"):
        ops.rms_norm(rand(1, 16385), rand(16385), EPS)
