"""What users get back: Label (one per moderated token), Verdict (one per stream), Moderation and GenModeration (one
per conversation). Plain immutable data; no torch, no engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Role = Literal["user", "assistant"]
Action = Literal["allow", "flag", "block"]


@dataclass(frozen=True, slots=True, eq=False)
class Label:
    """The model's reading of a stream up to and including one token.

    role "user": the query heads' label of the whole prompt, read at its last token.
    role "assistant": the response heads' label of the response so far.
    Probabilities are the softmax of the logits, at full precision; category is the argmax even when risk is
    "Safe" (the model has no "no violation" class), so read it only for other risks.
    """

    stream_id: str
    role: Role
    position: int  # index into stream.token_ids
    token_id: int
    risk: str
    category: str
    risk_probs: dict[str, float]
    category_probs: dict[str, float]
    risk_logits: npt.NDArray[np.float32]  # [R], config order
    category_logits: npt.NDArray[np.float32]  # [C of the role], config order


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a policy makes of a stream's labels so far. Monotonic: once "flag" or "block", it stays so until
    the stream is rolled back past the deciding token.

    risk and category are those that decided ("Safe" and None while nothing did); position is the deciding
    token's, None while nothing decided; rule names the rule that decided; cleared counts the assistant tokens
    that may be shown to the reader.
    """

    action: Action
    risk: str
    category: str | None
    position: int | None
    rule: str
    cleared: int


@dataclass(frozen=True, slots=True)
class Moderation:
    """One whole conversation: the prompt's label, the verdict on the last response (None when the
    conversation ends with the user) and the labels of the response's tokens."""

    prompt: Label | None
    response: Verdict | None
    labels: list[Label]


UNPARSABLE = "Unparsable"


@dataclass(frozen=True, slots=True)
class GenModeration:
    """What a Gen checkpoint answers about the last message of one conversation.

    role: whose message was judged: "user" for a prompt, "assistant" for a response.
    safety: "Safe", "Unsafe" or "Controversial"; "Unparsable" where the answer has no safety line, which no policy
    lets pass. categories: as the model names them, in its order; () for "None". refusal: whether the response is one,
    "Yes" or "No"; None for a prompt.
    The probabilities are a softmax over the choices that the answer's grammar has at that place: safety levels; what
    could stand first in the list of categories, "None" included, after the safety that was answered; refusal, after
    all of that. {} where the answer left the grammar, and where there is no such line.
    text: the answer as it was generated. verdict: what the policy makes of it.
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
