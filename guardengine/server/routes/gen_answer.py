"""A Gen checkpoint's answer in the terms of a chat completion: its tokens, their log probabilities, and where it is
cut."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from guardengine.labels import GenModeration
from guardengine.server.json_values import verdict_json
from guardengine.server.taxonomy import finite

_LEAST = -9999.0  # OpenAI's number for a token that is not among the likeliest
# The model chooses after the colon of a line; the choice begins with a space.
_LINES = (("safety_probs", "Safety"), ("category_probs", "Categories"), ("refusal_probs", "Refusal"))


class Tokenizer(Protocol):
    def encode_text(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class Answer(NamedTuple):
    """The part of an answer that is sent. `tokens`, joined, are its text; `found` is the whole moderation."""

    tokens: list[str]
    finish_reason: str
    num_tokens: int
    found: GenModeration

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def lines(self) -> Iterator[list[str]]:
        """The tokens of each line, the line break included."""
        line: list[str] = []
        for token in self.tokens:
            line.append(token)
            if token.endswith("\n"):
                yield line
                line = []
        if line:
            yield line


def answer_of(found: GenModeration, tokenizer: Tokenizer, max_tokens: int | None) -> Answer:
    """The answer for a moderation, cut after `max_tokens` tokens."""
    tokens = [tokenizer.decode([token_id]) for token_id in tokenizer.encode_text(found.text)]
    if "".join(tokens) != found.text:  # characters of several tokens: no grammar has any
        tokens = list(found.text)
    if max_tokens is not None and max_tokens <= len(tokens):
        return Answer(tokens[:max_tokens], "length", max_tokens, found)
    return Answer(tokens, "stop", found.num_answer_tokens, found)


def logprobs_of(answer: Answer, tokenizer: Tokenizer, num_top: int) -> list[dict[str, Any]]:
    """OpenAI's logprobs.content for an answer.

    The probabilities are over the choices that the grammar allows at a place: the safety level, the first category,
    the refusal. The first token of a choice has its log probability. All other tokens have 0.0, and so have further
    categories, for which no probability is known, and all tokens of an answer that does not follow the grammar.
    """
    choices = dict(_choices(answer.found))
    content, at = [], 0
    for token in answer.tokens:
        top = {token: 0.0}
        if at in choices:
            top = {}
            for name, p in choices[at].items():
                first = tokenizer.decode(tokenizer.encode_text(f" {name}")[:1])
                top[first] = top.get(first, 0.0) + p  # "Non-..." and "None" may begin alike
            top = {first: math.log(p) if p > 0 else _LEAST for first, p in top.items()}
        ranked = sorted(top.items(), key=lambda item: -item[1])[:num_top]
        content.append(
            _entry(token, top.get(token, _LEAST)) | {"top_logprobs": [_entry(*item) for item in ranked]}
        )
        at += len(token)
    return content


def guard_json(found: GenModeration) -> dict[str, Any]:
    """The parsed answer as a JSON object."""

    def probs(by_name: Mapping[str, float]) -> dict[str, float | None]:
        return {name: finite(p) for name, p in by_name.items()}

    return {
        "role": found.role,
        "safety": found.safety,
        "categories": list(found.categories),
        "refusal": found.refusal,
        "safety_probs": probs(found.safety_probs),
        "category_probs": probs(found.category_probs),
        "refusal_probs": probs(found.refusal_probs),
        "verdict": verdict_json(found.verdict),
    }


def _entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _choices(found: GenModeration) -> Iterator[tuple[int, Mapping[str, float]]]:
    """The places in the text where the model chooses, and the probabilities of the choices."""
    for attribute, name in _LINES:
        probs: Mapping[str, float] = getattr(found, attribute)
        match = re.search(rf"^{name}:", found.text, re.MULTILINE)
        if probs and match:
            yield match.end(), probs
