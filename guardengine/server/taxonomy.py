"""Scores and categories of a prompt's label, in Qwen3Guard's names or in those of OpenAI's moderations API."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from guardengine.labels import Label, short_category
from guardengine.policy import Policy

# OpenAI's categories -> the categories of Qwen3Guard whose largest score they get. Qwen3Guard's categories are coarser,
# so OpenAI's finer ones get no score. Political, PII, Copyright and Jailbreak have no counterpart: a text of these
# categories only has `flagged`.
OPENAI_CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "harassment": ("Unethical",),
    "harassment/threatening": (),
    "hate": ("Unethical",),
    "hate/threatening": (),
    "illicit": ("Illegal Acts",),
    "illicit/violent": (),
    "self-harm": ("Self-Harm",),
    "self-harm/instructions": (),
    "self-harm/intent": (),
    "sexual": ("Sexual Content",),
    "sexual/minors": (),
    "violence": ("Violent",),
    "violence/graphic": (),
}


def finite(value: float) -> float | None:
    """A probability for JSON, which has no NaN: null then."""
    return value if math.isfinite(value) else None


def scores(label: Label, policy: Policy) -> dict[str, float]:
    """For every category c the probability that the text is unsafe and of category c: the sum of P(r) over the risks
    outside `policy.safe_risks`, times P(c)."""
    unsafe = math.fsum(p for risk, p in label.risk_probs.items() if risk not in policy.safe_risks)
    found = {name: unsafe * p for name, p in label.category_probs.items()}
    # A broken model must not read as harmless.
    return {name: min(1.0, value) if math.isfinite(value) else 1.0 for name, value in found.items()}


def flags(label: Label, is_flagged: bool) -> dict[str, bool]:
    """For every category whether it is the one that the model names, and the policy acts on the text."""
    return {name: is_flagged and name == label.category for name in label.category_probs}


def as_openai(
    by_name: Mapping[str, float] | Mapping[str, bool], empty: float | bool
) -> dict[str, float | bool]:
    """Scores or flags for OpenAI's categories. `empty`: the value of a category without counterpart."""
    short = {short_category(name): value for name, value in by_name.items()}
    return {name: _largest(short, sources, empty) for name, sources in OPENAI_CATEGORIES.items()}


def _largest(short: Mapping[str, float | bool], sources: Iterable[str], empty: float | bool) -> float | bool:
    return max((short[source] for source in sources if source in short), default=empty)
