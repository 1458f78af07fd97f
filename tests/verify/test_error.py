"""The numbers of verify-quantization on logits made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from guardengine.labels import Verdict
from guardengine.verify.error import (
    Flips,
    RoleLogits,
    VerdictErrors,
    flips_by_margin,
    role_errors,
    verdict_errors,
)

RISKS = ("Safe", "Unsafe", "Controversial")


def logits_of(*probabilities: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_errors_are_those_of_all_logits_of_both_heads() -> None:
    standard = RoleLogits(
        torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    )
    other = RoleLogits(standard.risk + torch.tensor([0.0, 0.5, 0.0]), standard.category - 0.1)
    errors = role_errors(standard, other, RISKS)
    assert errors.num_labels == 2
    assert errors.num_not_finite == 0
    assert errors.max_logit_error == pytest.approx(0.5)
    assert errors.mean_logit_error == pytest.approx((2 * 0.5 + 4 * 0.1) / 10)
    # Adding 0.1 to all of a head's logits changes no probability; the risks' are e^x over their sum.
    exact = [math.exp(x) for x in (0.0, 1.0, 2.0)]
    moved = [math.exp(x) for x in (0.0, 1.5, 2.0)]
    p, q = [x / sum(exact) for x in exact], [x / sum(moved) for x in moved]
    assert errors.max_probability_error == pytest.approx(q[1] - p[1], rel=1e-5)
    first = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    exact, moved = [math.exp(x) for x in (3.0, 1.0, 0.0)], [math.exp(x) for x in (3.0, 1.5, 0.0)]
    p, q = [x / sum(exact) for x in exact], [x / sum(moved) for x in moved]
    second = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert errors.mean_kl == pytest.approx((first + second) / 2, rel=1e-5)
    assert errors.risk_agreement == errors.category_agreement == 1.0


def test_flips_are_counted_by_the_standards_margin() -> None:
    standard = logits_of(
        (0.405, 0.395, 0.2),  # margin 0.01: flips
        (0.405, 0.2, 0.395),  # margin 0.01: stays
        (0.43, 0.40, 0.17),  # margin 0.03: flips
        (0.35, 0.43, 0.22),  # margin 0.08: stays
        (0.6, 0.3, 0.1),  # margin 0.3: flips
        (0.1, 0.8, 0.1),  # margin 0.7: stays
    )
    other = standard.clone()
    for row, risk in ((0, 1), (2, 1), (4, 2)):
        other[row, risk] = 3.0
    category = torch.zeros(6, 2) + torch.tensor([1.0, 0.0])
    other_category = category.clone()
    other_category[3, 1] = 2.0  # risk Unsafe: counts
    other_category[0, 1] = 2.0  # risk Safe by the standard: does not
    errors = role_errors(RoleLogits(standard, category), RoleLogits(other, other_category), RISKS)
    assert errors.flips == (
        Flips(0.0, 0.02, 2, 1),
        Flips(0.02, 0.05, 1, 1),
        Flips(0.05, 0.1, 1, 0),
        Flips(0.1, 2.0, 2, 1),
    )
    assert errors.num_flipped == 3
    assert errors.risk_agreement == 0.5
    assert errors.num_not_safe == 2
    assert errors.category_agreement == 0.5


def test_a_margin_on_an_edge_belongs_to_the_bin_above() -> None:
    margins = torch.tensor([0.0, 0.02, 0.05, 0.1, 1.0], dtype=torch.float64)
    flips = flips_by_margin(margins, torch.ones(5, dtype=torch.bool))
    assert [part.num_labels for part in flips] == [1, 1, 1, 2]
    assert [part.num_flipped for part in flips] == [1, 1, 1, 2]


def test_logits_that_are_not_finite_agree_with_nothing_and_hide_no_error() -> None:
    standard = RoleLogits(torch.tensor([[0.0, 1.0, 2.0]] * 3), torch.tensor([[1.0, 0.0]] * 3))
    other = RoleLogits(standard.risk.clone(), standard.category.clone())
    other.risk[0] = math.nan
    other.category[1, 0] = math.inf
    other.risk[2, 0] = 0.25
    errors = role_errors(standard, other, RISKS)
    assert errors.num_not_finite == 2
    assert errors.risk_agreement == errors.category_agreement == pytest.approx(1 / 3)
    assert errors.num_flipped == 2
    assert errors.max_logit_error == 0.25
    assert errors.mean_kl is not None
    assert math.isfinite(errors.mean_kl)


def test_no_labels_have_no_numbers() -> None:
    nothing = RoleLogits(torch.empty(0, 3), torch.empty(0, 8))
    errors = role_errors(nothing, nothing, RISKS)
    assert errors.num_labels == errors.num_flipped == 0
    assert errors.max_logit_error is errors.mean_logit_error is errors.risk_agreement is None
    assert errors.max_probability_error is errors.mean_kl is errors.category_agreement is None


def test_verdicts_differ_by_action_or_by_anything() -> None:
    allow = Verdict("allow", "Safe", None, None, "none", 5)
    block = Verdict("block", "Unsafe", "Violent", 7, "debounce", 2)
    later = Verdict("block", "Unsafe", "Violent", 9, "debounce", 4)
    assert verdict_errors([allow, block, block, allow], [allow, later, allow, block]) == VerdictErrors(
        4, 2, 3
    )
