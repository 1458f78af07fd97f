"""Grammar: the answers that a Gen checkpoint is asked for, as a tree over token ids. No torch, no engine.

    Safety: S \\n Categories: None | C {, C} [\\n Refusal: R] end

Between two choices every token is forced. A choice is made by its options' first tokens, which differ, so that one
row of logits decides it. Categories are named at most once each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from guardengine.checkpoint.model_config import RISKS
from guardengine.errors import CheckpointError
from guardengine.gen.parse import CATEGORIES, NONE, REFUSALS
from guardengine.labels import Role

Kind = Literal["safety", "category", "more", "refusal"]
_JAILBREAK = "Jailbreak"  # a prompt's category only
_LIST_ENDS, _LIST_GOES_ON = "end", "more"


class Option(NamedTuple):
    """One way on: its name and its tokens."""

    name: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A place in an answer where it may go on in several ways, after `lead`, which is forced."""

    kind: Kind
    lead: tuple[int, ...]
    options: tuple[Option, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What tells the options apart."""
        return tuple(option.tokens[0] for option in self.options)


class Grammar:
    """The answers about a prompt (role "user") or a response ("assistant"), in one tokenizer's ids."""

    def __init__(self, encode: Callable[[str], list[int]], role: Role, end_id: int) -> None:
        """Raises CheckpointError for a tokenizer that cuts the answers in a way that leaves no single choices."""
        self.role, self.end_id = role, end_id
        self._categories = tuple(
            Option(name, tuple(encode(f" {name}")))
            for name in CATEGORIES
            if role == "user" or name != _JAILBREAK
        )
        self._none = Option(NONE, tuple(encode(f" {NONE}")))
        self._refusal: Choice | None = None
        if role == "assistant":
            lead = tuple(encode("\nRefusal:"))
            self._refusal = Choice(
                "refusal", lead, tuple(Option(name, tuple(encode(f" {name}"))) for name in REFUSALS)
            )
        self.start = Choice(
            "safety",
            tuple(encode("Safety:")),
            tuple(Option(name, tuple(encode(f" {name}"))) for name in RISKS),
        )
        self._first = Choice("category", tuple(encode("\nCategories:")), (self._none, *self._categories))
        ends = (end_id,) if self._refusal is None else self._refusal.lead[:1]
        self._more = Choice("more", (), (Option(_LIST_ENDS, ends), Option(_LIST_GOES_ON, tuple(encode(",")))))
        self._check(encode)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens between which any choice decides, ascending."""
        choices = [self.start, self._first, self._more, *([self._refusal] if self._refusal else [])]
        return tuple(sorted({token for choice in choices for token in choice.token_ids}))

    @property
    def num_tokens(self) -> int:
        """Of the longest answer, its end included."""
        longest = max(len(option.tokens) for option in self.start.options)
        names = sum(len(option.tokens) + 1 for option in self._categories)
        refusal = 0 if self._refusal is None else len(self._refusal.lead) + 1
        return len(self.start.lead) + longest + len(self._first.lead) + names + refusal + 1

    def after(self, choice: Choice, option: Option, named: Sequence[str]) -> Choice | None:
        """What comes after an option was taken; None: only the end. `named`: the categories so far, this one
        included."""
        if choice.kind == "safety":
            return self._first
        if choice.kind == "category":
            is_last = option is self._none or len(named) == len(self._categories)
            return self._refusal if is_last else self._more
        if choice.kind == "more" and option.name == _LIST_GOES_ON:
            left = tuple(option for option in self._categories if option.name not in named)
            return Choice("category", (), left)
        if choice.kind == "more" and self._refusal is not None:  # whose first token that was
            return Choice("refusal", self._refusal.lead[1:], self._refusal.options)
        return None

    def _check(self, encode: Callable[[str], list[int]]) -> None:
        for choice in (self.start, self._first, self._more, self._refusal):
            if choice is not None and len(set(choice.token_ids)) < len(choice.options):
                names = ", ".join(option.name for option in choice.options)
                raise CheckpointError(
                    f"tokenizer.json: two of the answers {names} begin with the same token, so that choosing needs "
                    "more than one row of logits; use Qwen3's tokenizer.json"
                )
        # Pieces that are encoded one by one must be what the whole answer is encoded into.
        names_of_all = tuple(option.name for option in self._categories)
        lists: list[tuple[str, ...]] = [(NONE,), *((name,) for name in names_of_all), names_of_all]
        for row in lists:
            walk, text = Walk(self), f"Safety: {RISKS[-1]}\nCategories: {', '.join(row)}"
            text += "" if self._refusal is None else f"\nRefusal: {REFUSALS[0]}"
            if not all(walk.feed(token) for token in [*encode(text), self.end_id]) or not walk.has_ended:
                raise CheckpointError(
                    f"tokenizer.json: encodes {text!r} in another way than its parts, so that answers cannot be "
                    "chosen part by part; use Qwen3's tokenizer.json"
                )


@dataclass(slots=True)
class Walk:
    """A way through a grammar, token by token."""

    grammar: Grammar
    named: tuple[str, ...] = ()
    safety: str | None = None
    has_ended: bool = False
    _choice: Choice | None = field(init=False)  # the next one; None: only the end is left
    _forced: tuple[int, ...] = field(init=False)  # before it

    def __post_init__(self) -> None:
        self._choice, self._forced = self.grammar.start, self.grammar.start.lead

    @property
    def choice(self) -> Choice | None:
        """What is to be chosen now; None where the next token is forced."""
        return None if self._forced else self._choice

    @property
    def is_decided(self) -> bool:
        """Whether nothing is left to choose."""
        return self._choice is None

    @property
    def forced(self) -> tuple[int, ...]:
        """The tokens that can only come next; the end, where nothing else is left."""
        if self._forced or self._choice is not None or self.has_ended:
            return self._forced
        return (self.grammar.end_id,)

    def likely(self) -> Option | None:
        """The option of `choice` that most answers take: nothing is wrong. None where there is no such."""
        choice = self.choice
        if choice is None:
            return None
        first = choice.options[0]
        if choice.kind == "category" and (first.name != NONE or self.safety != RISKS[0]):
            return None
        return first

    def pass_forced(self) -> tuple[int, ...]:
        """Go on to the next choice, or to the end if there is none; returns the tokens in between."""
        passed, self._forced = self._forced, ()
        return passed

    def choose(self, option: Option) -> None:
        """Take an option of `choice`."""
        choice = self._choice
        if choice is None:
            return
        if choice.kind == "safety":
            self.safety = option.name
        elif choice.kind == "category" and option.name != NONE:
            self.named += (option.name,)
        self._choice = self.grammar.after(choice, option, self.named)
        self._forced = option.tokens[1:] + (self._choice.lead if self._choice is not None else ())
        if option.tokens[0] == self.grammar.end_id:
            self.has_ended = True

    def feed(self, token_id: int) -> bool:
        """Go one token on. False, with nothing changed, where the grammar has no such token there."""
        forced, choice = self.forced, self.choice
        if forced:
            if token_id != forced[0]:
                return False
            self.has_ended = not self._forced
            self._forced = self._forced[1:]
            return True
        if choice is None:
            return False
        for option in choice.options:
            if option.tokens[0] == token_id:
                self.choose(option)
                return True
        return False
