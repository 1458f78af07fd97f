"""The results: Label (one per moderated token), Verdict (one per stream), Moderation and GenModeration (one per
conversation). Plain immutable data; no torch, no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # clients have no numpy
    import numpy as np
    import numpy.typing as npt

from guardengine.text.spans import Span

Role = Literal["user", "assistant"]
Action = Literal["allow", "flag", "block"]

# The categories' names in the Stream checkpoints -> in the evaluation script and in Gen's answers.
LONG_CATEGORY_NAMES: Mapping[str, str] = {
    "Violent": "Violent",
    "Sexual Content": "Sexual Content or Sexual Acts",
    "Self-Harm": "Suicide & Self-Harm",
    "Political": "Politically Sensitive Topics",
    "PII": "PII",
    "Copyright": "Copyright Violation",
    "Illegal Acts": "Non-violent Illegal Acts",
    "Unethical": "Unethical Acts",
    "Jailbreak": "Jailbreak",
}
# The evaluation script's "Violent" literally contains the double quotes.
_SHORT_NAMES = {long: short for short, long in LONG_CATEGORY_NAMES.items()} | {'"Violent"': "Violent"}


def short_category(name: str) -> str:
    """The short name of a category. Short names, and names that are not known here, are returned unchanged.

    Args:
        name: A short or a long name.
    """
    return _SHORT_NAMES.get(name, name)


@dataclass(frozen=True, slots=True, eq=False)
class Label:
    """The model's classification of a stream up to and including one token.

    Probabilities are the softmax of the logits, at full precision. `risk` and `category` are the likeliest class
    (argmax). The model has no class for "no violation", so `category` has a meaning only where `risk` is not "Safe".

    Attributes:
        stream_id: The id of the stream.
        role: "user": the label of the whole prompt, from the query heads at its last token. "assistant": the label of
            the response so far, from the response heads.
        position: Index of the token in `stream.token_ids`, from 0.
        token_id: The Qwen3 id of the token.
        risk: "Safe", "Unsafe" or "Controversial": the names in the checkpoint's config.json.
        category: The likeliest category, by the checkpoint's name.
        risk_probs: Risk -> probability, 0 to 1.
        category_probs: Category -> probability, 0 to 1. Prompts and responses have different categories.
        risk_logits: float32 array [R], in the order of config.json; R is the number of risks.
        category_logits: float32 array [C], in the order of config.json; C is the number of the role's categories.
    """

    stream_id: str
    role: Role
    position: int
    token_id: int
    risk: str
    category: str
    risk_probs: dict[str, float]
    category_probs: dict[str, float]
    risk_logits: npt.NDArray[np.float32]
    category_logits: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A policy's decision on a stream from its labels so far.

    It is monotonic: once "flag" or "block", it stays so until the stream is rolled back past the deciding token.

    Attributes:
        action: "allow", "flag" or "block".
        risk: The risk that decided; "Safe" while nothing is decided; "Unknown" where tokens got no label and the
            policy blocks then.
        category: The category of the deciding token, None while nothing is decided.
        position: The position of the deciding token in the stream, None while nothing is decided.
        rule: The rule that decided: "prompt", "debounce", "eval-compat", "error", "timeout" or "overload"; "none"
            while nothing is decided. "-open" is added where a failure was let pass, as in "timeout-open".
        cleared: How many assistant tokens of the stream, from its first on, may be shown to the reader.
    """

    action: Action
    risk: str
    category: str | None
    position: int | None
    rule: str
    cleared: int


@dataclass(frozen=True, slots=True)
class Moderation:
    """The moderation of one whole conversation by a Stream checkpoint.

    Attributes:
        prompt: The label of the last user message, None where it could not be judged.
        response: The verdict on the last message; None when the conversation ends with the user.
        labels: The labels of the response's tokens, in order; [] when there is no response.
        verdict: The verdict on all of it, prompt, response and tokens that went unjudged.
        spans: Where the token of each label stands in the content of the last message; None for one that was not fed as
            text by itself, as those of a reply with reasoning. None altogether unless `spans=True` asked for them.
        num_tokens: Tokens of the rendered conversation, the template's included.
        is_complete: Whether all tokens were judged.
    """

    prompt: Label | None
    response: Verdict | None
    labels: list[Label]
    verdict: Verdict | None = None
    spans: list[Span | None] | None = None
    num_tokens: int = 0
    is_complete: bool = True


UNPARSABLE = "Unparsable"


@dataclass(frozen=True, slots=True)
class GenModeration:
    """The answer of a Gen checkpoint about the last message of one conversation.

    The probabilities are a softmax over the choices that the grammar of the answer allows at that place. They are {}
    where the answer did not follow the grammar, and where it has no such line.

    Attributes:
        role: Whose message was judged: "user" for a prompt, "assistant" for a response.
        safety: "Safe", "Unsafe" or "Controversial". "Unparsable" where the answer has no safety line; every policy
            blocks that.
        categories: Categories by the model's names, in its order; () for the answer "None".
        refusal: Whether the response refuses the request, "Yes" or "No"; None for a prompt.
        safety_probs: Safety level -> probability.
        category_probs: Category -> probability that it is the first in the list of categories, given the safety that
            was answered; "None" is one of them.
        refusal_probs: "Yes" and "No" -> probability, given the safety and the categories that were answered.
        text: The answer as the model generated it.
        verdict: The policy's verdict on the answer.
        num_prompt_tokens: Tokens of the rendered conversation, the template's included.
        num_answer_tokens: Tokens of the answer.
    """

    role: Role
    safety: str
    categories: tuple[str, ...]
    refusal: str | None
    safety_probs: dict[str, float]
    category_probs: dict[str, float]
    refusal_probs: dict[str, float]
    text: str
    verdict: Verdict
    num_prompt_tokens: int
    num_answer_tokens: int
