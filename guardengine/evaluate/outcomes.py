"""What came of each row: calls under every rule, and scores. No tensors.

Strict calls count Controversial as unsafe, loose calls count it as safe. For a Stream checkpoint they are verdicts of
the policies that serve, on labels of one forward:

    report       Policy(rule="report"): two tokens in a row that are hits
    eval-compat  Policy(rule="eval-compat"): the released script's rule

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
    """Whether a row was called unsafe, and by which token: an index into the conversation's tokens."""

    is_unsafe: bool
    position: int | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one row. scores: from 0 to 1, how unsafe it looks in each mode; see `stream_outcome` and
    `gen_outcome`. has_own_ids: the row's input_ids are other tokens than those that were judged, so its span may mean
    others."""

    row: Row
    target: Target
    calls: Mapping[tuple[RuleName, Mode], Call]
    scores: Mapping[Mode, float]
    has_own_ids: bool = False
    is_unparsable: bool = False


def stream_outcome(
    row: Row, target: Target, labels: Sequence[Label], num_reply_labels: int, *, has_own_ids: bool = False
) -> Outcome:
    """What labels of a Stream checkpoint amount to.

    labels: of a prompt the one; of a response all in the window that the script judges. The first `num_reply_labels` of
    these are the reply's, which "report" judges: the script's window has the newline behind <|im_end|> too.

    A prompt's score is its label's probability of a risk that counts as unsafe in that mode; a response's is the
    highest that two of its tokens in a row reach (`debounced_score`). So a policy with `category_thresholds` (strict)
    or `risk_thresholds` (loose) of t calls a row unsafe exactly when its score is at least t.
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
    """What a Gen checkpoint's answer amounts to. An answer that cannot be parsed is unsafe in both modes. The score is
    the probability of the safety levels that count as unsafe; without probabilities 1.0 or 0.0, as was called."""
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
    """In [0, 1]; 1.0 where a probability is not finite: policies take that for a hit."""
    safe = ("Safe",) if mode == "strict" else ("Safe", "Controversial")
    total = math.fsum(p for risk, p in probs.items() if risk not in safe)
    return min(total, 1.0) if math.isfinite(math.fsum(probs.values())) else 1.0
