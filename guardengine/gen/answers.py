"""ChosenAnswer and GreedyAnswer: how the answer to one conversation comes about, token by token. No torch, no engine.

Both are asked for what to feed next and told what the head made of it:

    start()           tokens to feed after the prompt, and after which of them the head is to read
    advance(logits)   what it read there -> a Move, or None when the answer is complete

A chosen answer feeds a guess, the most common way on through the grammar, as one chunk: the head's choices along it
are looked at all at once, up to the first that went another way. So an answer takes as many steps as it has surprises,
and what it says is what deciding one choice after the other would have said.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from guardengine.gen.grammar import Choice, Grammar, Kind, Option, Walk

Floats = npt.NDArray[np.float32]
Mode = Literal["choice", "greedy"]
MAX_NEW_TOKENS = 128  # the released code's


class Move(NamedTuple):
    """The next tokens of an answer. `num_kept` of the answer's tokens stay, `token_ids` follow them, and the head reads
    after those at `reads`, counted from the answer's start; -1 is the prompt's last token."""

    num_kept: int
    token_ids: tuple[int, ...]
    reads: tuple[int, ...]


class Answer(Protocol):
    """One that is under way."""

    token_ids: list[int]  # decided so far; at the end, the token that ended it included
    odds: dict[Kind, dict[str, float]]  # probabilities of the options at the first choice of each kind
    is_broken: bool  # ended by logits that are not finite
    most_tokens: int  # that it may be fed

    def start(self) -> Move: ...

    def advance(self, logits: Floats) -> Move | None:
        """Shapes: logits [reads, K]; K is the grammar's `token_ids`, or the vocabulary."""


class ChosenAnswer:
    """An answer of the grammar: of a choice's options the likeliest is taken."""

    def __init__(self, grammar: Grammar) -> None:
        self.token_ids: list[int] = []
        self.odds: dict[Kind, dict[str, float]] = {}
        self.is_broken = False
        self.most_tokens = grammar.num_tokens
        self._walk, self._end_id = Walk(grammar), grammar.end_id
        self._columns = {token: column for column, token in enumerate(grammar.token_ids)}
        self._guesses: list[Option | None] = []  # what was fed on at each read; None: nothing was

    def start(self) -> Move:
        self.token_ids += self._walk.pass_forced()
        return self._guess(0)

    def advance(self, logits: Floats) -> Move | None:
        for row, guess in zip(logits, self._guesses, strict=True):
            choice = self._walk.choice
            if choice is None:
                break
            odds = _odds(choice, [row[self._columns[token]] for token in choice.token_ids])
            if odds is None:
                self.is_broken = True
                break
            self.odds.setdefault(choice.kind, odds)
            taken = max(choice.options, key=lambda option: odds[option.name])
            num_kept = len(self.token_ids)
            self._walk.choose(taken)
            self.token_ids += taken.tokens[:1] + self._walk.pass_forced()
            if self._walk.is_decided:
                self.token_ids += () if self._walk.has_ended else (self._end_id,)
                break
            if taken is not guess:
                return self._guess(num_kept)
        return None

    def _guess(self, num_kept: int) -> Move:
        """Feed what was decided past `num_kept` tokens, and the likely way on."""
        walk = copy.copy(self._walk)
        fed = self.token_ids[num_kept:]
        reads: list[int] = []
        self._guesses = []
        while True:
            reads.append(num_kept + len(fed) - 1)
            option = walk.likely()
            self._guesses.append(option)
            if option is None:
                break
            walk.choose(option)
            if walk.is_decided:  # its tokens decide nothing
                break
            fed += option.tokens[:1] + walk.pass_forced()
        return Move(num_kept, tuple(fed), tuple(reads))


class GreedyAnswer:
    """The likeliest token after every token, as transformers' greedy `generate` has it."""

    def __init__(self, grammar: Grammar, stop_ids: frozenset[int]) -> None:
        self.token_ids: list[int] = []
        self.odds: dict[Kind, dict[str, float]] = {}
        self.is_broken = False
        self.most_tokens = MAX_NEW_TOKENS
        self._walk: Walk | None = Walk(grammar)  # None: it has left the grammar
        self._stop_ids = stop_ids

    def start(self) -> Move:
        return Move(0, (), (-1,))

    def advance(self, logits: Floats) -> Move | None:
        (row,) = logits
        token_id = int(row.argmax())
        if not np.isfinite(row[token_id]):  # argmax finds a NaN where there is one
            self.is_broken = True
            return None
        walk = self._walk
        if walk is not None:
            choice = walk.choice
            if choice is not None and (odds := _odds(choice, row[list(choice.token_ids)].tolist())):
                self.odds.setdefault(choice.kind, odds)
            if not walk.feed(token_id):
                self._walk = None
        self.token_ids.append(token_id)
        num_tokens = len(self.token_ids)
        if token_id in self._stop_ids or num_tokens == self.most_tokens:
            return None
        return Move(num_tokens - 1, (token_id,), (num_tokens - 1,))


def _odds(choice: Choice, logits: Sequence[float]) -> dict[str, float] | None:
    """Softmax over the options of a choice; None for logits that are not finite."""
    if not all(map(math.isfinite, logits)):
        return None
    largest = max(logits)
    weights = [math.exp(float(logit) - largest) for logit in logits]
    total = sum(weights)
    return {option.name: weight / total for option, weight in zip(choice.options, weights, strict=True)}
