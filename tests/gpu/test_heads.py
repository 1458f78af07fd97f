"""The guard heads' kernel: the reference's logits, their readout, wanted rows only, one launch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from launches import counted
from native_ops import rand
from torch import Tensor
from triton_interpreter import program_order

from guardengine.kernels import gpu as ops
from guardengine.kernels import reference
from guardengine.kernels.gpu.workspace import Workspace, allocate_workspace

EPS = 1e-6
SIZES = ops.ClassifierSizes(3, 8, 3, 9)
LOGITS = sum(SIZES)


class Heads(NamedTuple):
    final_norm: Tensor
    pre: Tensor
    inner_norm: Tensor
    response: Tensor
    query: Tensor

    def double(self) -> Heads:
        return Heads(*(tensor.double() for tensor in self))


def heads(width: int, inner: int, dtype: torch.dtype = torch.bfloat16) -> Heads:
    return Heads(
        1 + rand(width, dtype=dtype, scale=0.1),
        rand(2 * inner, width, dtype=dtype, scale=width**-0.5),
        1 + rand(2, inner, dtype=dtype, scale=0.1),
        rand(11, inner, dtype=dtype, scale=inner**-0.5),
        rand(12, inner, dtype=dtype, scale=inner**-0.5),
    )


def workspace(num_rows: int, inner: int) -> Workspace:
    allocated = allocate_workspace({}, "cpu", others=[ops.guard_scores_scratch(num_rows, inner, SIZES)])
    allocated.partials.fill_(torch.nan)
    return allocated


def scores(x: Tensor, weights: Heads, wanted: list[int], num_labels: int | None = None) -> Tensor:
    """`guard_scores` over a static buffer of 20 rows, of which some are wanted; what it leaves alone is 7."""
    index = torch.full((20,), -5, dtype=torch.int32)
    index[: len(wanted)] = torch.tensor(wanted, dtype=torch.int32)
    count = torch.tensor(len(wanted) if num_labels is None else num_labels, dtype=torch.int32)
    out, scratch = torch.full((20, 2 * LOGITS + 4), 7.0), workspace(20, weights.inner_norm.shape[1])
    result = ops.guard_scores(x, index, count, *weights, EPS, SIZES, out=out, workspace=scratch)
    assert result is out
    assert not scratch.counters.any()
    return out


def exact_logits(x: Tensor, weights: Heads) -> Tensor:
    final_norm, pre, inner_norm, response, query = weights.double()

    def norm(rows: Tensor, weight: Tensor) -> Tensor:
        return rows / (rows.square().mean(-1, keepdim=True) + EPS).sqrt() * weight

    pairs = (norm(x.double(), final_norm) @ pre.T).chunk(2, dim=-1)
    return torch.cat(
        [norm(p, n) @ head.T for p, n, head in zip(pairs, inner_norm, (response, query), strict=True)], dim=1
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "width", "inner"), [(1, 64, 32), (17, 192, 40), (3, 100, 528)])
def test_logits(num_rows: int, width: int, inner: int, dtype: torch.dtype) -> None:
    x, weights = rand(num_rows, width, dtype=dtype, scale=3), heads(width, inner, dtype)
    actual, exact = ops.guard_heads(x, *weights, EPS), exact_logits(x, weights)
    assert actual.dtype == torch.float32
    error = (actual.double() - exact).abs().max().item()
    plain = (reference.guard_heads(x, *weights, EPS).double() - exact).abs().max().item()
    assert error <= 2 * plain + 1e-6 * exact.abs().max().item()


def test_scores() -> None:
    x, weights = rand(24, 64, dtype=torch.bfloat16), heads(64, 32)
    wanted = [3, 0, 23, *range(4, 19)]  # two tiles, in any order
    actual = scores(x, weights, wanted)
    logits = actual[: len(wanted), :LOGITS]
    assert torch.equal(logits, ops.guard_heads(x[wanted], *weights, EPS))
    parts = logits.split(SIZES, dim=1)
    probs = torch.cat([part.softmax(1) for part in parts], dim=1)
    torch.testing.assert_close(actual[: len(wanted), LOGITS : 2 * LOGITS], probs, rtol=1e-6, atol=1e-7)
    likeliest = torch.stack([part.argmax(1) for part in parts], dim=1)
    assert torch.equal(actual[: len(wanted), 2 * LOGITS :], likeliest.float())
    assert (actual[len(wanted) :] == 7).all()


@pytest.mark.parametrize("num_labels", [0, 1, 16])
def test_rows_past_num_labels_are_left_alone(num_labels: int) -> None:
    x, weights = rand(20, 64, dtype=torch.bfloat16), heads(64, 32)
    x[num_labels:] = torch.nan
    actual = scores(x, weights, list(range(20)), num_labels)
    assert torch.equal(actual[:num_labels, :LOGITS], ops.guard_heads(x[:num_labels], *weights, EPS))
    assert (actual[num_labels:] == 7).all()


def test_tiles_without_a_wanted_row_do_nothing() -> None:
    x, weights = rand(20, 64, dtype=torch.bfloat16), heads(64, 32)
    out, scratch = torch.empty(40, 2 * LOGITS + 4), workspace(40, 32)
    scratch.counters[2:] = 100  # of the second tile of rows, where nobody may arrive
    index = torch.arange(40, dtype=torch.int32) % 20
    ops.guard_scores(x, index, torch.tensor(16), *weights, EPS, SIZES, out=out, workspace=scratch)
    assert scratch.counters.tolist() == [0, 0, 100, 100, 100, 100]


def test_rows_do_not_depend_on_their_number_or_neighbours() -> None:
    x, weights = rand(20, 64, dtype=torch.bfloat16), heads(64, 48)
    whole = scores(x, weights, list(range(20)))
    assert torch.equal(
        scores(x, weights, [19, 7]), whole[[19, 7, *[0] * 18]].where(_first(2), torch.tensor(7.0))
    )
    poisoned = x.clone()
    poisoned[::2] = torch.nan
    assert torch.equal(scores(poisoned, weights, list(range(20)))[1::2], whole[1::2])
    assert torch.equal(ops.guard_heads(x[:5], *weights, EPS), whole[:5, :LOGITS])


def _first(count: int) -> Tensor:
    return (torch.arange(20) < count)[:, None]


@pytest.mark.usefixtures("any_program_order")
def test_blocks_are_added_in_one_order_whoever_comes_last() -> None:
    x, weights = rand(18, 64), heads(64, 48, torch.float32)
    actual = scores(x, weights, list(range(18)))
    with program_order("ascending"):
        assert torch.equal(actual, scores(x, weights, list(range(18))))


def test_equal_logits_name_the_first_class() -> None:
    weights = heads(64, 32)
    weights.response.zero_()
    weights.query[1:3] = weights.query[1]
    weights.query[0] = -weights.query[1]
    x = rand(4, 64, dtype=torch.bfloat16)
    likeliest = scores(x, weights, [0, 1, 2, 3])[:4, 2 * LOGITS :]
    assert (likeliest[:, :2] == 0).all()
    assert set(likeliest[:, 2].tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_class_of_broken_logits_is_minus_one(value: float) -> None:
    """argmax over NaN would name class 0, which is "Safe"."""
    weights = heads(64, 32)
    weights.response[1] = value  # the middle one of the response's risks
    actual = scores(rand(2, 64, dtype=torch.bfloat16), weights, [0, 1])[:2]
    assert (actual[:, 2 * LOGITS] == -1).all()
    assert (actual[:, 2 * LOGITS + 1 :] >= 0).all()
    assert not actual[:, :LOGITS].isfinite()[:, 1].any()
    assert actual[:, :LOGITS].isfinite()[:, [0, *range(2, LOGITS)]].all()


def test_other_sizes_and_integers() -> None:
    """No categories in a pair, more than sixteen classes in the other; indices of eight bytes."""
    weights = heads(64, 32)
    weights = weights._replace(
        response=rand(2, 32, dtype=torch.bfloat16), query=rand(20, 32, dtype=torch.bfloat16)
    )
    sizes = ops.ClassifierSizes(1, 1, 3, 17)
    x = rand(3, 64, dtype=torch.bfloat16)
    out = torch.empty(2, 48)
    scratch = allocate_workspace({}, "cpu", others=[ops.guard_scores_scratch(2, 32, sizes)])
    ops.guard_scores(
        x, torch.tensor([2, 0]), torch.tensor([2]), *weights, EPS, sizes, out=out, workspace=scratch
    )  # fmt: skip
    torch.testing.assert_close(out[:, :22], exact_logits(x[[2, 0]], weights).float(), rtol=0.02, atol=0.02)
    assert torch.equal(
        out[:, 44:], torch.stack([part.argmax(1) for part in out[:, :22].split(sizes, 1)], 1).float()
    )


def test_many_rows_are_several_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guardengine.kernels.gpu.heads._MOST_ROWS", 4)
    x, weights = rand(10, 64, dtype=torch.bfloat16), heads(64, 16)
    whole = ops.guard_heads(x, *weights, EPS)
    assert counted(lambda: ops.guard_heads(x, *weights, EPS))[0] == 3
    monkeypatch.undo()
    assert torch.equal(whole, ops.guard_heads(x, *weights, EPS))
    assert counted(lambda: ops.guard_heads(x, *weights, EPS))[0] == 1
    assert ops.guard_heads(x[:0], *weights, EPS).shape == (0, LOGITS)


def test_scores_are_one_launch() -> None:
    x, weights = rand(4, 64, dtype=torch.bfloat16), heads(64, 16)
    index, count = torch.zeros(4, dtype=torch.int32), torch.tensor(4, dtype=torch.int32)
    out, scratch = torch.empty(4, 2 * LOGITS + 4), workspace(4, 16)
    call = lambda: ops.guard_scores(  # noqa: E731
        x, index, count, *weights, EPS, SIZES, out=out, workspace=scratch
    )
    assert counted(call) == (1, [])


def test_what_is_not_supported_is_said() -> None:
    x, weights = rand(4, 64), heads(64, 32, torch.float32)
    index, count = torch.arange(4), torch.tensor(4)
    out, scratch = torch.empty(4, 2 * LOGITS + 4), workspace(4, 32)
    with pytest.raises(ValueError, match=r"final_norm is \(64,\) torch.bfloat16"):
        ops.guard_heads(x, *weights._replace(final_norm=weights.final_norm.bfloat16()), EPS)
    with pytest.raises(ValueError, match=r"query_head is \(11, 32\)"):
        ops.guard_scores(
            x,
            index,
            count,
            *weights._replace(query=weights.query[:11]),
            EPS,
            SIZES,
            out=out,
            workspace=scratch,
        )
    with pytest.raises(ValueError, match="for 23 logits"):
        ops.guard_scores(x, index, count, *weights, EPS, SIZES, out=out[:, :-1], workspace=scratch)
    with pytest.raises(ValueError, match="label_index"):
        ops.guard_scores(x, index[:3], count, *weights, EPS, SIZES, out=out, workspace=scratch)
    with pytest.raises(ValueError, match="do not fit a workspace"):
        ops.guard_scores(
            x, index, count, *weights, EPS, SIZES, out=out, workspace=allocate_workspace({}, "cpu")
        )
