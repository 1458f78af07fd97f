"""TextBooks: what a stream knows of the text behind its tokens. Plain data; no tokenizer, no engine.

Part of a StreamState, so that fork copies it and rollback cuts it with everything else. One thread writes, others may
read meanwhile: books only grow, what is read first is written last, and a rollback puts new books in their place.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from guardengine.text.foreign_ids import ForeignIds


class Span(NamedTuple):
    """Where a token stands in its reply's text: text[start_char:end_char].

    Whole characters: those of which the token has at least one byte, together with what Unicode normalization
    composes them with. Tokens that share a character therefore overlap in it. Bytes are those of the same
    characters in UTF-8, so a cut at any of the four numbers leaves whole characters.
    """

    start_char: int
    end_char: int
    start_byte: int
    end_byte: int


Offsets = tuple[int, int, int, int]  # a Span's, a third of its cost to make


class Held(NamedTuple):
    """A reply's text beyond its tokens."""

    text: str = ""  # may still be split in other ways, so it was not fed
    partial: bytes = b""  # the beginning of a character
    num_chars: int = 0  # of the reply, before `text`
    num_bytes: int = 0

    @property
    def is_empty(self) -> bool:
        return not self.text and not self.partial


class Piece(NamedTuple):
    """More of a reply: text, or ids of the LLM's own tokenizer."""

    text: str | bytes = ""
    foreign_ids: Sequence[int] = ()
    tokenizer: Any = None  # that foreign_ids are of
    is_final: bool = False  # nothing is held back after it
    ends_turn: bool = False  # the reply's <|im_end|> is fed after it

    @staticmethod
    def of_foreign(token_ids: Sequence[int], tokenizer: Any) -> Piece:
        """Raises ConfigError for what cannot decode."""
        ForeignIds.begin(tokenizer)
        return Piece(foreign_ids=tuple(token_ids), tokenizer=tokenizer)


class Settled(NamedTuple):
    """What a piece comes to: the tokens to feed, where they stand, and how the reply's text is left."""

    token_ids: list[int]
    spans: list[Offsets]
    held: Held
    foreign: ForeignIds | None


@dataclass(slots=True)
class TextBooks:
    """The text of one stream: what of the current reply is held back, and the spans of tokens that came from text."""

    held: Held = field(default_factory=Held)
    foreign: ForeignIds | None = None  # where the ids of another tokenizer were left
    positions: array[int] = field(default_factory=lambda: array("i"))  # of these tokens, ascending
    ordinals: array[int] = field(
        default_factory=lambda: array("i")
    )  # how many assistant tokens are before each
    spans: list[Offsets] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether anything was accepted that no token stands for yet."""
        return not self.held.is_empty or (self.foreign is not None and self.foreign.is_pending)

    def extend(self, position: int, ordinal: int, settled: Settled) -> None:
        """Record that the tokens of a piece were fed from `position` on, `ordinal` assistant tokens being before it."""
        num_tokens = len(settled.token_ids)
        self.spans += settled.spans
        self.ordinals.extend(range(ordinal, ordinal + num_tokens))
        self.positions.extend(range(position, position + num_tokens))
        self.held, self.foreign = settled.held, settled.foreign

    def span(self, position: int) -> Span | None:
        index = bisect_left(self.positions, position)
        found = index < len(self.positions) and self.positions[index] == position
        return Span(*self.spans[index]) if found else None

    def cleared_chars(self, reply_start: int, cleared: int) -> int:
        """How many characters of the reply that begins at position `reply_start` are wholly in the first `cleared`
        assistant tokens of the stream."""
        num_chars, num_tokens = self.held.num_chars, len(self.positions)
        first = bisect_left(self.positions, reply_start, 0, num_tokens)
        if first == num_tokens:
            return 0
        index = bisect_left(self.ordinals, cleared, first, num_tokens)
        if index < num_tokens:
            return self.spans[index][0]
        return min(num_chars, self.spans[index - 1][1])

    def cut_before(self, reply_start: int, cleared: int) -> tuple[int, int]:
        """Where the reply that begins at position `reply_start` can be cut, no character being cut, so that at most the
        first `cleared` assistant tokens of the stream stay: how many of them do, and how many of its characters."""
        num_tokens = len(self.positions)
        first = bisect_left(self.positions, reply_start)
        index = bisect_left(self.ordinals, cleared, first)
        while first < index < num_tokens and self.spans[index][0] < self.spans[index - 1][1]:
            index -= 1
        if index < num_tokens:
            return self.ordinals[index], self.spans[index][0]
        return cleared, self.held.num_chars if index > first else 0

    def cut(self, num_tokens: int) -> TextBooks:
        """The books without what is held, and without all tokens from position `num_tokens` on. A character that is
        cut counts as gone."""
        index = bisect_left(self.positions, num_tokens)
        _, _, num_chars, num_bytes = self.held
        if index < len(self.spans):
            num_chars, _, num_bytes, _ = self.spans[index]
            # The first token of a later reply; templates stand between two replies.
            if index and not num_chars and self.positions[index - 1] + 1 != self.positions[index]:
                _, num_chars, _, num_bytes = self.spans[index - 1]
        held = Held("", b"", num_chars, num_bytes)
        return TextBooks(held, None, self.positions[:index], self.ordinals[:index], self.spans[:index])

    def copy(self) -> TextBooks:
        return TextBooks(self.held, self.foreign, self.positions[:], self.ordinals[:], self.spans[:])
