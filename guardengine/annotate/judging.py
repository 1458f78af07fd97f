"""Conversations to annotations: what of an engine's answer goes into a data set, and how one bad row fails alone."""

from __future__ import annotations

from collections.abc import Sequence

from guardengine.annotate.journal import Annotation, Entry, Fault
from guardengine.annotate.layout import Messages
from guardengine.annotate.response_chars import ResponseChars
from guardengine.engine.moderator import Moderator
from guardengine.errors import GuardEngineError
from guardengine.labels import UNPARSABLE, GenModeration, Label, Moderation
from guardengine.policy import Policy

# Text of so many characters is judged in a call of its own: where it proves to be too long, only it was tokenized.
LONG_CHARS = 1 << 15

Item = tuple[int, Messages | Fault]  # a row's number and what is judged, or why it cannot be
Judged = tuple[list[tuple[int, Entry]], int]  # rows' entries, and how many tokens were computed


def judge_call(engine: Moderator, call: Sequence[Item], policy: Policy, chars: ResponseChars) -> Judged:
    """`judge` for rows by their numbers, of which some may be faults already."""
    entries: list[tuple[int, Entry]] = [(row, found) for row, found in call if isinstance(found, Fault)]
    left = [(row, found) for row, found in call if not isinstance(found, Fault)]
    found, num_tokens = judge(engine, [messages for _, messages in left], policy, chars)
    return [*entries, *zip((row for row, _ in left), found, strict=True)], num_tokens


def judge(
    engine: Moderator, conversations: Sequence[Messages], policy: Policy, chars: ResponseChars
) -> tuple[list[Entry], int]:
    """The entry of each conversation, and how many tokens were computed.

    What the engine refuses is a Fault of the row to blame. Every other error is raised.
    """
    entries: list[Entry] = []
    num_tokens = 0
    answers = engine.moderate_many(list(conversations), policy, on_unfit="return")
    for messages, answer in zip(conversations, answers, strict=True):
        if isinstance(answer, GuardEngineError):
            entries.append(Fault(str(answer)))
        else:
            entries.append(annotation(answer, messages, policy, chars))
            num_tokens += _num_tokens(answer)
    return entries, num_tokens


def annotation(
    answer: Moderation | GenModeration, messages: Messages, policy: Policy, chars: ResponseChars
) -> Annotation:
    """What of an answer goes into the data set.

    risk, category: the policy's verdict on the last message, "Safe" and None while it is no hit. Gen: all categories,
    as the model lists them; "Unparsable" where the answer has no safety level.
    scores: probability of each risk. Stream: of a prompt at its label; of a response at the token that `scored_label`
    chooses. Gen: the answer's; {} where it left the grammar.
    first_flag_token, first_flag_char: the first of the tokens in a row for which the policy flags the response, counted
    from the response's first, and where its text begins in the content of the last message. None for prompts, where
    nothing is flagged, and with Gen.
    """
    if isinstance(answer, GenModeration):
        if answer.safety == UNPARSABLE:
            return Annotation(UNPARSABLE, None, dict(answer.safety_probs), None, None)
        risk, category = answer.verdict.risk, answer.verdict.category
        if risk != "Safe":
            category = ", ".join(answer.categories) or category
        return Annotation(risk, category, dict(answer.safety_probs), None, None)
    if answer.response is None:
        prompt = answer.prompt
        if prompt is None:
            raise RuntimeError("the engine has computed no label of a prompt")
        verdict = policy.judge([prompt])
        return Annotation(verdict.risk, verdict.category, dict(prompt.risk_probs), None, None)
    verdict, labels = answer.response, answer.labels
    scores = dict(scored_label(labels, policy).risk_probs)
    if verdict.position is None:
        return Annotation(verdict.risk, verdict.category, scores, None, None)
    token = verdict.position - (policy.debounce - 1) - labels[0].position
    char = chars.start_of(messages[-1]["content"], [label.token_id for label in labels[:-1]], token)
    return Annotation(verdict.risk, verdict.category, scores, token, char)


def scored_label(labels: Sequence[Label], policy: Policy) -> Label:
    """The label whose probabilities stand for a response: the least unsafe of those `policy.debounce` in a row that
    are, so taken, the most unsafe.

    Its probability of the risks that the policy acts on is the highest threshold that still flags the response, so
    rows may be ranked, and flagged at other thresholds, by it. A peak at a single token does not count.
    """
    unsafe = [
        sum(p for risk, p in label.risk_probs.items() if risk not in policy.safe_risks) for label in labels
    ]
    width = min(policy.debounce, len(labels))
    windows = (range(start, start + width) for start in range(len(labels) - width + 1))
    return labels[max((min(window, key=unsafe.__getitem__) for window in windows), key=unsafe.__getitem__)]


def _num_tokens(answer: Moderation | GenModeration) -> int:
    if isinstance(answer, GenModeration):
        return answer.num_prompt_tokens + answer.num_answer_tokens
    last = answer.labels[-1] if answer.labels else answer.prompt
    return 0 if last is None else last.position + 1
