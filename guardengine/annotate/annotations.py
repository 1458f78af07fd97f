"""From an engine's answers to the annotations of rows. A row that cannot be judged fails alone."""

from __future__ import annotations

from collections.abc import Sequence

from guardengine.annotate.journal import Annotation, Entry, Fault
from guardengine.annotate.layout import Messages
from guardengine.annotate.response_chars import ResponseChars
from guardengine.engine.moderator import Moderator
from guardengine.errors import GuardEngineError
from guardengine.labels import UNPARSABLE, GenModeration, Label, Moderation
from guardengine.policy import Policy

# Longer text (in characters) is judged in a call of its own. If it is too long, only this text was tokenized in vain.
LONG_CHARS = 1 << 15

Item = tuple[int, Messages | Fault]  # the number of a row, and its conversation or why it has none
Judged = tuple[list[tuple[int, Entry]], int]  # the entries of rows, and how many tokens were computed


def judge_call(engine: Moderator, call: Sequence[Item], policy: Policy, chars: ResponseChars) -> Judged:
    """The entries of rows, by their numbers, and how many tokens were computed. Some of the rows may be faults
    already."""
    entries: list[tuple[int, Entry]] = [(row, found) for row, found in call if isinstance(found, Fault)]
    left = [(row, found) for row, found in call if not isinstance(found, Fault)]
    found, num_tokens = judge(engine, [messages for _, messages in left], policy, chars)
    return [*entries, *zip((row for row, _ in left), found, strict=True)], num_tokens


def judge(
    engine: Moderator, conversations: Sequence[Messages], policy: Policy, chars: ResponseChars
) -> tuple[list[Entry], int]:
    """The entry of each conversation, and how many tokens were computed.

    A conversation that the engine refuses becomes a Fault of its row. Every other error is raised.
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
    """The annotation of a row, from the engine's answer.

    risk and category are the policy's verdict on the last message, "Safe" and None when it is no hit. With a Gen
    checkpoint category has all categories that the model lists; risk is "Unparsable" when the answer has no safety
    level.

    scores has the probability of each risk. With a Stream checkpoint it is that of the prompt's label, or for a
    response that of the label which `scored_label` chooses. With a Gen checkpoint it is the answer's, {} when the
    answer did not follow the grammar.

    first_flag_token is the first of the tokens in a row for which the policy flags the response, counted from the
    response's first token; first_flag_char is where its text begins in the content of the last message. Both are None
    for prompts, when nothing is flagged, and with a Gen checkpoint.

    Args:
        answer: The engine's answer.
        messages: The conversation.
        policy: The policy of the run.
        chars: Maps tokens to characters.
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
            raise RuntimeError("the engine has computed no label for a prompt")
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
    """The label whose probabilities stand for a whole response.

    With u_i the probability of the unsafe risks at token i and d = policy.debounce, it is the label at the token that
    gives max over i of min(u_i, ..., u_(i+d-1)). That number is the highest threshold at which the response is still
    flagged, so rows can be ranked by it, and flagged at other thresholds. A peak at a single token does not count.

    Args:
        labels: The labels of the response, in order.
        policy: Says which risks are unsafe, and has `debounce`.
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
