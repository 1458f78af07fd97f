"""The distance between the labels of two runs: the numbers of `guardengine verify-quantization`.

Pure functions of logits; knows no engine and no quantization scheme. "Standard" is the run in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from guardengine.labels import Verdict

MARGINS = (0.02, 0.05, 0.1)  # edges between the bins of `Flips`


class RoleLogits(NamedTuple):
    """The float32 logits of all labels of one role.

    Attributes:
        risk: [N, risks].
        category: [N, categories].
    """

    risk: Tensor
    category: Tensor


@dataclass(frozen=True, slots=True)
class Flips:
    """Labels whose margin is in one bin. The margin is the difference of the probabilities of the two likeliest risks
    in the standard.

    Attributes:
        margin_from: Lower edge of the bin.
        margin_to: Upper edge, exclusive; for the last bin it is above every margin.
        num_labels: Number of labels.
        num_flipped: Labels whose risk differs from the standard's.
    """

    margin_from: float
    margin_to: float
    num_labels: int
    num_flipped: int


@dataclass(frozen=True, slots=True)
class RoleErrors:
    """The difference between one role's labels and the standard's. Shares and errors without any label are None.

    Errors are over all logits (risk and category) of labels whose logits are finite. Other labels are counted in
    num_not_finite and agree with nothing. Categories are compared where the risk in the standard is not Safe, because
    only there they have a meaning.

    Attributes:
        num_labels: Number of labels.
        num_not_finite: Labels with a logit that is not finite.
        max_logit_error: Largest absolute difference of a logit.
        mean_logit_error: Mean absolute difference of the logits.
        max_probability_error: Largest absolute difference of the probability of a risk or category.
        mean_kl: Mean of KL(standard || other) of the risks' probabilities, in nats.
        risk_agreement: Share of labels with the same risk.
        num_not_safe: Labels that are not Safe in the standard.
        category_agreement: Share of these with the same category.
        flips: One entry for each bin between MARGINS.
    """

    num_labels: int
    num_not_finite: int
    max_logit_error: float | None
    mean_logit_error: float | None
    max_probability_error: float | None
    mean_kl: float | None
    risk_agreement: float | None
    num_not_safe: int
    category_agreement: float | None
    flips: tuple[Flips, ...]

    @property
    def num_flipped(self) -> int:
        return sum(part.num_flipped for part in self.flips)


@dataclass(frozen=True, slots=True)
class VerdictErrors:
    """The difference between verdicts and the standard's.

    Attributes:
        num_conversations: Number of conversations.
        num_actions: Conversations with another action, such as allow and block.
        num_any: Conversations with another verdict: another action, token, risk or category.
    """

    num_conversations: int
    num_actions: int
    num_any: int


def role_errors(standard: RoleLogits, other: RoleLogits, risks: Sequence[str]) -> RoleErrors:
    """Compare the same labels of two runs.

    Args:
        standard: The logits in float32.
        other: The logits of the other run, in the same order.
        risks: The names of the risk logits, in order.
    """
    finite = other.risk.isfinite().all(1) & other.category.isfinite().all(1)
    risk, other_risk = standard.risk.double().log_softmax(1), other.risk.double().log_softmax(1)
    category, other_category = standard.category.double().softmax(1), other.category.double().softmax(1)
    errors = torch.cat((other.risk - standard.risk, other.category - standard.category), 1)[finite].abs()
    probability_errors = torch.cat((other_risk.exp() - risk.exp(), other_category - category), 1)[
        finite
    ].abs()
    divergences = F.kl_div(other_risk, risk, reduction="none", log_target=True).sum(1)[finite]
    same_risk = (risk.argmax(1) == other_risk.argmax(1)) & finite
    not_safe = risk.argmax(1) != list(risks).index("Safe")
    same_category = ((category.argmax(1) == other_category.argmax(1)) & finite)[not_safe]
    likeliest = risk.exp().topk(2, dim=1).values if len(risks) > 1 else torch.ones(len(risk), 1)
    return RoleErrors(
        num_labels=len(finite),
        num_not_finite=int((~finite).sum()),
        max_logit_error=_max(errors),
        mean_logit_error=_mean(errors),
        max_probability_error=_max(probability_errors),
        mean_kl=_mean(divergences),
        risk_agreement=_mean(same_risk),
        num_not_safe=int(not_safe.sum()),
        category_agreement=_mean(same_category),
        flips=flips_by_margin(likeliest[:, 0] - likeliest[:, -1], ~same_risk),
    )


def flips_by_margin(margins: Tensor, flipped: Tensor) -> tuple[Flips, ...]:
    """Count labels by their margin in the standard. Shapes: margins [N], 0 to 1; flipped [N] bool."""
    edges = (0.0, *MARGINS, 2.0)
    bins = torch.bucketize(margins, torch.tensor(MARGINS, dtype=margins.dtype), right=True)
    return tuple(
        Flips(edges[index], edges[index + 1], int((bins == index).sum()), int(flipped[bins == index].sum()))
        for index in range(len(MARGINS) + 1)
    )


def verdict_errors(standard: Sequence[Verdict], other: Sequence[Verdict]) -> VerdictErrors:
    """Compare the verdicts of two runs on the same conversations."""
    pairs = list(zip(standard, other, strict=True))
    return VerdictErrors(
        len(pairs), sum(a.action != b.action for a, b in pairs), sum(a != b for a, b in pairs)
    )


def _max(values: Tensor) -> float | None:
    return float(values.max()) if values.numel() else None


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if values.numel() else None
