"""The product kernel and its fused forms: as close as plain PyTorch, the same bits in any company and any order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from launches import counted
from native_ops import assert_close_as_torch, rand
from pairwise import grid
from torch import Tensor
from triton_interpreter import program_order

from guardengine.kernels import gpu as ops
from guardengine.kernels import reference
from guardengine.kernels.gpu.linear_config import GATED, NORMED, PLAIN, SUMMED, LinearConfig, default_config
from guardengine.kernels.gpu.workspace import Workspace, allocate_workspace

EPS = 1e-6
FUSED = (NORMED, GATED, SUMMED)
WHOLE = LinearConfig(block_m=32, block_n=32, block_k=64, split_k=1, num_warps=4, num_stages=3)
SPLIT = LinearConfig(block_m=32, block_n=16, block_k=32, split_k=4, num_warps=4, num_stages=3)

TALL = LinearConfig(block_m=64, block_n=16, block_k=32, split_k=4, num_warps=4, num_stages=3)


def workspace(shape: tuple[int, ...], config: LinearConfig, max_rows: int = 64) -> Workspace:
    configs = {(name, (shape[0], shape[1])): config for name in FUSED}
    allocated = allocate_workspace(configs, "cpu", max_rows=max_rows)
    allocated.partials.fill_(torch.nan)  # as memory may be
    return allocated


def run(operator: str, x: Tensor, weight: Tensor, config: LinearConfig = SPLIT) -> Tensor:
    """One operator with a norm and a residual that depend on its shape only."""
    scratch = workspace(weight.shape, config)
    norm = 1 + rand(x.shape[1], dtype=x.dtype, scale=0.1)
    if operator == PLAIN:
        out = ops.linear(x, weight)
    elif operator == NORMED:
        out = ops.norm_linear(x, norm, EPS, weight, workspace=scratch)
    elif operator == GATED:
        out = ops.norm_gate_up(x, norm, EPS, weight, workspace=scratch)
    else:
        out = ops.linear_add(x, weight, residual(x, weight), workspace=scratch)
    assert not scratch.counters.any()
    return out


def residual(x: Tensor, weight: Tensor) -> Tensor:
    return rand(64, weight.shape[0], dtype=x.dtype, scale=4)[: x.shape[0]].clone()


def formula(operator: str, x: Tensor, weight: Tensor) -> Tensor:
    """The operator in float64."""
    norm = (1 + rand(x.shape[1], dtype=x.dtype, scale=0.1)).double()
    x64, w64 = x.double(), weight.double()
    if operator in (NORMED, GATED):
        x64 = x64 / (x64.square().mean(-1, keepdim=True) + EPS).sqrt() * norm
    out = x64 @ w64.T
    if operator == GATED:
        gate, up = out.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return out + residual(x, weight).double() if operator == SUMMED else out


def plain(operator: str, x: Tensor, weight: Tensor) -> Tensor:
    """The operator as the reference's operators make it, one after another."""
    if operator in (NORMED, GATED):
        x = reference.rms_norm(x, 1 + rand(x.shape[1], dtype=x.dtype, scale=0.1), EPS)
    out = reference.linear(x, weight)
    if operator == GATED:
        return reference.silu_and_mul(out)
    return out + residual(x, weight) if operator == SUMMED else out


@grid(operator=[PLAIN, *FUSED], dtype=[torch.float32, torch.bfloat16, torch.float16], config=[WHOLE, SPLIT])
def test_matches_the_formula(operator: str, dtype: torch.dtype, config: LinearConfig) -> None:
    # One row and several tiles of them; block edges, and columns and numbers past the last whole block.
    for num_rows, (out, inner) in ((1, (64, 192)), (17, (34, 101)), (33, (16, 128)), (5, (2, 16))):
        x = rand(num_rows, inner, dtype=dtype, scale=2)
        weight = rand(out, inner, dtype=dtype, scale=inner**-0.5)
        actual = run(operator, x, weight, config)
        assert_close_as_torch(actual, plain(operator, x, weight), formula(operator, x, weight))


@pytest.mark.parametrize(
    ("operator", "config"),
    [(PLAIN, WHOLE), (GATED, WHOLE), *((operator, config) for operator in FUSED for config in (SPLIT, TALL))],
)
def test_rows_do_not_depend_on_their_number_or_neighbours(operator: str, config: LinearConfig) -> None:
    x, weight = rand(64, 160, dtype=torch.bfloat16), rand(48, 160, dtype=torch.bfloat16)
    whole = run(operator, x, weight, config)
    for num_rows in (1, 16, 17, 33):  # one tile of 16 rows, one of 32, two
        assert torch.equal(run(operator, x[:num_rows], weight, config), whole[:num_rows]), num_rows
    poisoned = x.clone()
    poisoned[1::2] = torch.nan
    poisoned[33] = torch.inf
    assert torch.equal(run(operator, poisoned, weight, config)[::2], whole[::2])


@pytest.mark.usefixtures("any_program_order")
@pytest.mark.parametrize("operator", FUSED)
def test_parts_are_added_in_one_order_whoever_comes_last(operator: str) -> None:
    x, weight = rand(3, 192), rand(32, 192)
    actual = run(operator, x, weight)
    with program_order("ascending"):
        assert torch.equal(actual, run(operator, x, weight))


@pytest.mark.parametrize("operator", FUSED)
def test_an_order_of_additions_is_a_weights_own(operator: str) -> None:
    """What the other tests rest on: another number of parts gives other bits."""
    x, weight = rand(3, 512), rand(32, 512)
    three = LinearConfig(32, SPLIT.block_n, SPLIT.block_k, 3, 4, 3)
    assert not torch.equal(run(operator, x, weight, SPLIT), run(operator, x, weight, three))


def test_more_parts_than_tiles() -> None:
    x, weight = rand(3, 40), rand(20, 40)
    empty = LinearConfig(32, 16, 32, 4, 4, 3)
    exact = formula(NORMED, x, weight)
    assert_close_as_torch(run(NORMED, x, weight, empty), plain(NORMED, x, weight), exact)


def test_exact_on_whole_numbers() -> None:
    """Sums of small integers have one right answer in any order: a lost or doubled product shows."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, (33, 200), generator=generator)
    weight = torch.randint(-3, 4, (40, 200), generator=generator)
    for dtype in (torch.float32, torch.float16):
        for config in (WHOLE, SPLIT):
            base = torch.zeros(33, 40, dtype=dtype)
            actual = ops.linear_add(
                x.to(dtype), weight.to(dtype), base, workspace=workspace(weight.shape, config)
            )
            assert torch.equal(actual, (x @ weight.T).to(dtype))


def test_eps_is_inside_the_root() -> None:
    x, weight = torch.full((1, 64), 1e-3), torch.ones(16, 64)
    out = ops.norm_linear(x, torch.ones(64), 3e-6, weight, workspace=workspace(weight.shape, SPLIT))
    assert out.mean().item() == pytest.approx(32, rel=1e-5)


def test_gate_comes_first() -> None:
    x = torch.ones(1, 16)
    weight = torch.cat((torch.full((16, 16), 0.25), torch.full((16, 16), 0.5)))
    out = ops.norm_gate_up(x, torch.ones(16), 0.0, weight, workspace=workspace(weight.shape, WHOLE))
    expected = torch.nn.functional.silu(torch.tensor(4.0)) * 8
    torch.testing.assert_close(out, expected.expand(1, 16))


def test_residual_is_added_to_in_place_and_nothing_else_is_written() -> None:
    x, weight, norm = rand(5, 96), rand(40, 96), rand(96)
    inputs = [tensor.clone() for tensor in (x, weight, norm)]
    wide = rand(5, 120)  # the residual is a part of it
    before, scratch = wide.clone(), workspace(weight.shape, SPLIT)
    part = wide[:, 40:80]
    assert ops.linear_add(x, weight, part, workspace=scratch).data_ptr() == part.data_ptr()
    fresh = ops.linear_add(x, weight, before[:, 40:80].contiguous(), workspace=scratch)
    assert torch.equal(part, fresh)
    assert torch.equal(wide[:, :40], before[:, :40])
    assert torch.equal(wide[:, 80:], before[:, 80:])
    out = torch.full((5, 40), torch.nan)
    assert ops.norm_linear(x, norm, EPS, weight, out=out, workspace=scratch) is out
    assert torch.equal(out, ops.norm_linear(x, norm, EPS, weight, workspace=scratch))
    for tensor, copy in zip((x, weight, norm), inputs, strict=True):
        assert torch.equal(tensor, copy)


def test_rows_of_x_need_not_lie_side_by_side() -> None:
    wide, weight = rand(5, 300, dtype=torch.bfloat16), rand(32, 96, dtype=torch.bfloat16)
    part = wide[:, 100:196]
    for operator in (PLAIN, *FUSED):
        assert torch.equal(run(operator, part, weight), run(operator, part.contiguous(), weight))


def test_launches_share_a_workspace() -> None:
    """Whatever one leaves there, the next gives the same bits."""
    x, norm = rand(20, 96), rand(96)
    shapes = [(20, 96), (48, 96)]
    scratch = allocate_workspace({(NORMED, shape): SPLIT for shape in shapes}, "cpu")
    for shape in (*shapes, *reversed(shapes)):
        weight = rand(*shape)
        actual = ops.norm_linear(x, norm, EPS, weight, workspace=scratch)
        assert torch.equal(actual, ops.norm_linear(x, norm, EPS, weight, workspace=workspace(shape, SPLIT)))


def test_each_is_one_launch() -> None:
    x, norm, weight, base = rand(3, 96), rand(96), rand(48, 96), rand(3, 48)
    for config in (WHOLE, SPLIT):
        scratch = workspace(weight.shape, config)
        calls: list[Callable[[], Tensor]] = [
            lambda: ops.linear(x, weight),
            lambda: ops.norm_linear(x, norm, EPS, weight, workspace=scratch),  # noqa: B023
            lambda: ops.norm_gate_up(x, norm, EPS, weight, workspace=scratch),  # noqa: B023
            lambda: ops.linear_add(x, weight, base, workspace=scratch),  # noqa: B023
        ]
        assert [counted(call) for call in calls] == [(1, [])] * 4


def test_more_than_64_rows_are_torchs() -> None:
    x, weight = rand(65, 32), rand(16, 32)
    assert torch.equal(ops.linear(x, weight), torch.nn.functional.linear(x, weight))
    assert counted(lambda: ops.linear(x, weight))[0] == 0


def test_no_rows() -> None:
    x, weight = torch.empty(0, 32), rand(16, 32)
    for operator in (PLAIN, *FUSED):
        assert run(operator, x, weight).shape[0] == 0


def test_what_is_not_supported_is_said() -> None:
    x, norm, weight = rand(2, 32), rand(32), rand(16, 32)
    scratch = workspace(weight.shape, SPLIT)
    with pytest.raises(ValueError, match="quantization=None"):
        ops.linear(x, reference.quantize(weight, "int8"))
    with pytest.raises(ValueError, match="float64"):
        ops.linear(x.double(), weight.double())
    with pytest.raises(ValueError, match="bfloat16"):
        ops.linear(x, weight.bfloat16())
    with pytest.raises(ValueError, match="65 rows are over 64"):
        ops.norm_linear(rand(65, 32), norm, EPS, weight, workspace=scratch)
    with pytest.raises(ValueError, match=r"norm is \(31,\)"):
        ops.norm_linear(x, norm[:31], EPS, weight, workspace=scratch)
    with pytest.raises(ValueError, match=r"out is \(3, 16\), \(2, 16\) fits"):
        ops.linear_add(x, weight, rand(3, 16), workspace=scratch)
    with pytest.raises(ValueError, match="contiguous"):
        ops.linear(x, rand(32, 16).T)
    with pytest.raises(ValueError, match="allocated without it"):
        ops.norm_linear(x, norm, EPS, rand(24, 32), workspace=scratch)
    few = workspace(weight.shape, SPLIT, max_rows=16)
    with pytest.raises(ValueError, match="allocate it for as many rows"):
        ops.norm_linear(rand(17, 32), norm, EPS, weight, workspace=few)


def test_the_contract_needs_no_workspace() -> None:
    for shape in ((4096, 1024), (96, 12288), (16, 16)):
        assert default_config(PLAIN, shape, dtype=torch.bfloat16, num_sms=132, max_split=1).split_k == 1
