"""gen_moderation(): what an answer says, and what a policy makes of it."""

from __future__ import annotations

import numpy as np

from guardengine.gen.answering import Job
from guardengine.gen.parse import NONE, Parsed, parse
from guardengine.labels import UNPARSABLE, GenModeration, Label, Role, Verdict
from guardengine.policy import Policy
from guardengine.text.tokenizer import Tokenizer

_NO_LOGITS = np.empty(0, dtype=np.float32)


def gen_moderation(job: Job, tokenizer: Tokenizer, policy: Policy) -> GenModeration:
    """The outcome of a job that is done."""
    answer, role = job.answer, job.prompt.role
    text = tokenizer.decode_text(answer.token_ids)
    parsed = parse(text, has_refusal=role == "assistant")
    if answer.is_broken or job.has_failed:
        parsed = Parsed(UNPARSABLE, (), None)
    risk_probs = answer.odds.get("safety", {})
    return GenModeration(
        role=role,
        safety=parsed.safety,
        categories=parsed.categories,
        refusal=parsed.refusal,
        safety_probs=risk_probs,
        category_probs=answer.odds.get("category", {}),
        refusal_probs=answer.odds.get("refusal", {}),
        text=text,
        verdict=_failed(policy) if job.has_failed else _verdict(policy, role, parsed, risk_probs),
        num_prompt_tokens=len(job.prompt.token_ids),
        num_answer_tokens=len(answer.token_ids),
    )


def _failed(policy: Policy) -> Verdict:
    return policy.verdict(policy.fail(policy.start(), "error", 0))


def _verdict(policy: Policy, role: Role, parsed: Parsed, risk_probs: dict[str, float]) -> Verdict:
    """An answer is judged by its one label, as a prompt is under a Stream checkpoint."""
    if parsed.safety == UNPARSABLE:
        return Verdict("block", UNPARSABLE, None, None, "unparsable", 0)
    counted = [name for name in parsed.categories if not policy.ignores(name)]
    category = (counted or parsed.categories or (NONE,))[0]
    label = Label(
        stream_id="",
        role="user",
        position=0,
        token_id=-1,
        risk=parsed.safety,
        category=category,
        # An answer that names its safety in a place of its own choice has it for certain.
        risk_probs=risk_probs or {parsed.safety: 1.0},
        category_probs={},
        risk_logits=_NO_LOGITS,
        category_logits=_NO_LOGITS,
    )
    verdict = policy.judge([label])
    if verdict.action == "allow":
        return verdict
    return Verdict(verdict.action, verdict.risk, None if category == NONE else category, None, "answer", 0)
