"""How far one run's labels are from another's: the numbers of `guardengine verify-quantization`.

Pure functions of logits; knows no engine and no scheme.
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
    """The logits of all labels of one role, float32."""

    risk: Tensor  # [N, R]
    category: Tensor  # [N, C]


@dataclass(frozen=True, slots=True)
class Flips:
    """Labels whose margin (between the standard's two likeliest risks, in probability) is in one bin."""

    margin_from: float
    margin_to: float  # exclusive; the last bin's is more than any margin
    num_labels: int
    num_flipped: int  # whose risk differs from the standard's


@dataclass(frozen=True, slots=True)
class RoleErrors:
    """What separates one role's labels from the standard's. Shares and errors of no labels at all are None.

    Errors are over all logits (risk and category) of labels whose logits are finite; the others are counted in
    num_not_finite and agree with nothing. Categories are compared where the standard's risk is not Safe, since only
    there they mean something.
    """

    num_labels: int
    num_not_finite: int
    max_logit_error: float | None
    mean_logit_error: float | None
    max_probability_error: float | None  # of any risk or category
    mean_kl: float | None  # KL(standard || other) of the risks' probabilities, in nats
    risk_agreement: float | None
    num_not_safe: int  # by the standard
    category_agreement: float | None
    flips: tuple[Flips, ...]  # one for each bin between MARGINS

    @property
    def num_flipped(self) -> int:
        return sum(part.num_flipped for part in self.flips)


@dataclass(frozen=True, slots=True)
class VerdictErrors:
    """Conversations whose verdict is not the standard's."""

    num_conversations: int
    num_actions: int  # allowed here and blocked there
    num_any: int  # or blocked at another token, for another risk or category


def role_errors(standard: RoleLogits, other: RoleLogits, risks: Sequence[str]) -> RoleErrors:
    """Compare the same labels of two runs. risks: the names of the risk logits, in order."""
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
    """Count labels by the standard's margin. Shapes: margins [N], from 0 to 1; flipped [N] bool."""
    edges = (0.0, *MARGINS, 2.0)
    bins = torch.bucketize(margins, torch.tensor(MARGINS, dtype=margins.dtype), right=True)
    return tuple(
        Flips(edges[index], edges[index + 1], int((bins == index).sum()), int(flipped[bins == index].sum()))
        for index in range(len(MARGINS) + 1)
    )


def verdict_errors(standard: Sequence[Verdict], other: Sequence[Verdict]) -> VerdictErrors:
    """Compare the verdicts on the same conversations."""
    pairs = list(zip(standard, other, strict=True))
    return VerdictErrors(
        len(pairs), sum(a.action != b.action for a, b in pairs), sum(a != b for a, b in pairs)
    )


def _max(values: Tensor) -> float | None:
    return float(values.max()) if values.numel() else None


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if values.numel() else None
