"""The outcome of each row: whether it is called unsafe, under every rule, and its scores. No tensors.

Strict calls count Controversial as unsafe, loose calls count it as safe. For a Stream checkpoint the calls are
verdicts of these policies on the labels of one forward:

    report       Policy(rule="report"): two hits in a row
    eval-compat  Policy(rule="eval-compat"): the rule of the released script

For a Gen checkpoint there is one rule, "answer".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from guardengine.evaluate.metrics import debounced_score
from guardengine.evaluate.rows import Row
from guardengine.labels import UNPARSABLE, GenModeration, Label
from guardengine.policy import Policy

Target = Literal["prompt", "response"]
Mode = Literal["strict", "loose"]
RuleName = Literal["report", "eval-compat", "answer"]

MODES: tuple[Mode, ...] = ("strict", "loose")
STREAM_RULES: tuple[RuleName, ...] = ("report", "eval-compat")
_POLICIES: dict[tuple[RuleName, Mode], Policy] = {
    ("report", "strict"): Policy.strict(rule="report"),
    ("report", "loose"): Policy.loose(rule="report"),
    ("eval-compat", "strict"): Policy.strict(rule="eval-compat"),
    ("eval-compat", "loose"): Policy.loose(rule="eval-compat"),
}


class Call(NamedTuple):
    """Whether a row was called unsafe, and the index of the token that decided among the conversation's tokens."""

    is_unsafe: bool
    position: int | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one row.

    Attributes:
        row: The row.
        target: Whether its prompt or its response was judged.
        calls: The call for each rule and mode.
        scores: How unsafe it looks in each mode, 0 to 1; see `stream_outcome` and `gen_outcome`.
        has_own_ids: The row's input_ids are not the tokens that were judged, so its span may be wrong for these.
        is_unparsable: The answer of a Gen checkpoint could not be parsed.
    """

    row: Row
    target: Target
    calls: Mapping[tuple[RuleName, Mode], Call]
    scores: Mapping[Mode, float]
    has_own_ids: bool = False
    is_unparsable: bool = False


def stream_outcome(
    row: Row, target: Target, labels: Sequence[Label], num_reply_labels: int, *, has_own_ids: bool = False
) -> Outcome:
    """The outcome of a row from labels of a Stream checkpoint.

    The score of a prompt is the probability of the risks that count as unsafe in the mode, at its label. The score of
    a response is the highest such probability that two tokens in a row reach (`debounced_score`). So a policy with
    `category_thresholds` (strict) or `risk_thresholds` (loose) of t calls a row unsafe exactly when its score is at
    least t.

    Args:
        row: The row.
        target: Whether its prompt or its response was judged.
        labels: The one label of a prompt; or all labels in the window that the script judges in a response.
        num_reply_labels: How many of them belong to the reply, which "report" judges. The script's window also has the
            newline after <|im_end|>.
        has_own_ids: See `Outcome`.
    """
    reply = labels[:num_reply_labels]
    calls = {}
    for (rule, mode), policy in _POLICIES.items():
        verdict = policy.judge(reply if rule == "report" else labels)
        calls[rule, mode] = Call(verdict.action != "allow", verdict.position)
    scores: dict[Mode, float] = {}
    for mode in MODES:
        each = [_unsafe_probability(label.risk_probs, mode) for label in reply]
        scores[mode] = debounced_score(each, 1 if target == "prompt" else 2)
    return Outcome(row, target, calls, scores, has_own_ids)


def gen_outcome(row: Row, target: Target, answer: GenModeration) -> Outcome:
    """The outcome of a row from the answer of a Gen checkpoint.

    An answer that cannot be parsed is unsafe in both modes. The score is the probability of the safety levels that
    count as unsafe; without probabilities it is 1.0 or 0.0, like the call.

    Args:
        row: The row.
        target: Whether its prompt or its response was judged.
        answer: The answer.
    """
    is_unparsable = answer.safety == UNPARSABLE
    called = {
        "strict": answer.safety != "Safe",
        "loose": answer.safety not in ("Safe", "Controversial"),
    }
    scores: dict[Mode, float] = {}
    for mode in MODES:
        known = bool(answer.safety_probs) and not is_unparsable
        scores[mode] = (
            _unsafe_probability(answer.safety_probs, mode) if known else 1.0 if called[mode] else 0.0
        )
    calls: dict[tuple[RuleName, Mode], Call] = {("answer", mode): Call(called[mode], None) for mode in MODES}
    return Outcome(row, target, calls, scores, is_unparsable=is_unparsable)


def _unsafe_probability(probs: Mapping[str, float], mode: Mode) -> float:
    """The probability of the unsafe risks, 0 to 1; 1.0 when a probability is not finite, because policies treat that
    as a hit."""
    safe = ("Safe",) if mode == "strict" else ("Safe", "Controversial")
    total = math.fsum(p for risk, p in probs.items() if risk not in safe)
    return min(total, 1.0) if math.isfinite(math.fsum(probs.values())) else 1.0
