"""TextState: where the tokens of a stream stand in the text that they were made from. Plain data; no tokenizer, no
engine.

Part of a StreamState, so that a fork copies it and a rollback cuts it with everything else. One thread writes, others
may read meanwhile: the lists only grow, what is read first is written last, and a rollback puts a new TextState in its
place.

An example: the reply "Oh 👍!" has 5 characters and 8 bytes, because 👍 takes 4 bytes. Qwen3 makes four tokens of it,
and no token is the whole thumb:

    token      id  text               characters  bytes
        0   11908  "Oh"               0 to 2      0 to 2
        1   61804  " " + 3 of 4 bytes 2 to 4      2 to 7
        2     235  the fourth byte    3 to 4      3 to 7
        3       0  "!"                4 to 5      7 to 8

The tokens 1 and 2 share the thumb, so their spans overlap in it. The prompt's tokens are the positions 0 to 9 here:

    >>> spans = [(0, 2, 0, 2), (2, 4, 2, 7), (3, 4, 3, 7), (4, 5, 7, 8)]
    >>> tokens = TokenizedPiece([11908, 61804, 235, 0], spans, HeldText(num_chars=5, num_bytes=8), None)
    >>> text = TextState()
    >>> text.extend(position=10, ordinal=0, piece=tokens)
    >>> text.span(11)
    Span(start_char=2, end_char=4, start_byte=2, end_byte=7)

How many characters may be shown when the first 0, 1, 2, ... assistant tokens are cleared? Two tokens clear the space
but not the thumb, whose last byte is in the third token:

    >>> [text.cleared_chars(reply_start=10, cleared=n) for n in range(5)]
    [0, 2, 3, 4, 5]

Where can the reply be cut, so that at most two tokens stay and no character is cut? After one token and 2 characters:

    >>> text.cut_before(reply_start=10, cleared=2)
    (1, 2)
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from guardengine.text.foreign_ids import ForeignIds


class Span(NamedTuple):
    """Where a token stands in the text of its reply: text[start_char:end_char].

    A span has whole characters: those of which the token has at least one byte, together with the characters that
    Unicode normalization (NFC) composes with them. Tokens that share a character overlap in it. The bytes are those of
    the same characters in UTF-8, so a cut at any of the four numbers leaves whole characters.

    Attributes:
        start_char: Index of the first character, from 0 at the beginning of the reply.
        end_char: Index just past the last character.
        start_byte: Index of the first byte in UTF-8, from 0 at the beginning of the reply.
        end_byte: Index just past the last byte.
    """

    start_char: int
    end_char: int
    start_byte: int
    end_byte: int


# The four numbers of a Span. A plain tuple is made in a third of the time.
Offsets = tuple[int, int, int, int]


class HeldText(NamedTuple):
    """The end of a reply that was accepted and has no tokens yet."""

    text: str = ""  # later text may still change how it splits into tokens
    partial: bytes = b""  # the first bytes of a character whose others have not come
    num_chars: int = 0  # characters of the reply before `text`
    num_bytes: int = 0

    @property
    def is_empty(self) -> bool:
        return not self.text and not self.partial


class Piece(NamedTuple):
    """More of a reply: text, or ids of the LLM's own tokenizer."""

    text: str | bytes = ""
    foreign_ids: Sequence[int] = ()
    tokenizer: Any = None  # the tokenizer of foreign_ids
    is_final: bool = False  # the reply ends after it, so nothing is held back
    ends_turn: bool = False  # the <|im_end|> of the reply is fed after it

    @staticmethod
    def of_foreign(token_ids: Sequence[int], tokenizer: Any) -> Piece:
        """Make a piece of another tokenizer's ids. Raises ConfigError for a tokenizer that cannot decode."""
        ForeignIds.begin(tokenizer)
        return Piece(foreign_ids=tuple(token_ids), tokenizer=tokenizer)


class TokenizedPiece(NamedTuple):
    """A piece of a reply as tokens: the ids to feed, their spans, and what is held back after it."""

    token_ids: list[int]
    spans: list[Offsets]
    held: HeldText
    foreign: ForeignIds | None


@dataclass(slots=True)
class TextState:
    """The text of one stream: the held-back end of the current reply, and the spans of all tokens that came from
    text."""

    held: HeldText = field(default_factory=HeldText)
    foreign: ForeignIds | None = None  # the newest ids of the LLM's own tokenizer
    # One entry for each token that came from text, in order: its position in the stream, the number of assistant tokens
    # before it, and its span.
    positions: array[int] = field(default_factory=lambda: array("i"))
    ordinals: array[int] = field(default_factory=lambda: array("i"))
    spans: list[Offsets] = field(default_factory=list)

    @property
    def has_unfed_text(self) -> bool:
        """Whether text or ids were accepted that have no tokens yet."""
        return not self.held.is_empty or (self.foreign is not None and self.foreign.is_pending)

    def extend(self, position: int, ordinal: int, piece: TokenizedPiece) -> None:
        """Record that the tokens of a piece were fed from `position` on, `ordinal` assistant tokens being before it."""
        num_tokens = len(piece.token_ids)
        self.spans += piece.spans
        self.ordinals.extend(range(ordinal, ordinal + num_tokens))
        self.positions.extend(range(position, position + num_tokens))
        self.held, self.foreign = piece.held, piece.foreign

    def span(self, position: int) -> Span | None:
        """The span of the token at this position of the stream, None for a token that did not come from text."""
        index = bisect_left(self.positions, position)
        if index < len(self.positions) and self.positions[index] == position:
            return Span(*self.spans[index])
        return None

    def cleared_chars(self, reply_start: int, cleared: int) -> int:
        """How many characters of a reply are wholly in the first `cleared` assistant tokens of the stream.

        Args:
            reply_start: The position in the stream of the reply's first token.
            cleared: A number of assistant tokens of the whole stream, as in `Verdict.cleared`.
        """
        num_chars, num_tokens = self.held.num_chars, len(self.positions)
        first = bisect_left(self.positions, reply_start, 0, num_tokens)
        if first == num_tokens:
            return 0
        index = bisect_left(self.ordinals, cleared, first, num_tokens)
        if index < num_tokens:
            return self.spans[index][0]
        return min(num_chars, self.spans[index - 1][1])

    def cut_before(self, reply_start: int, cleared: int) -> tuple[int, int]:
        """The last place where a reply can be cut between two characters, so that at most the first `cleared` assistant
        tokens of the stream stay.

        Args:
            reply_start: The position in the stream of the reply's first token.
            cleared: A number of assistant tokens of the whole stream.

        Returns:
            The number of assistant tokens of the stream before that place, and of the reply's characters before it.
        """
        num_tokens = len(self.positions)
        first = bisect_left(self.positions, reply_start)
        index = bisect_left(self.ordinals, cleared, first)
        while first < index < num_tokens and self.spans[index][0] < self.spans[index - 1][1]:
            index -= 1
        if index < num_tokens:
            return self.ordinals[index], self.spans[index][0]
        return cleared, self.held.num_chars if index > first else 0

    def truncated(self, num_tokens: int) -> TextState:
        """A new TextState without the tokens from position `num_tokens` on, and without held-back text. A character of
        which a token is dropped counts as dropped."""
        index = bisect_left(self.positions, num_tokens)
        _, _, num_chars, num_bytes = self.held
        if index < len(self.spans):
            num_chars, _, num_bytes, _ = self.spans[index]
            # The token at `index` begins a later reply: the tokens of the template stand between two replies.
            if index and not num_chars and self.positions[index - 1] + 1 != self.positions[index]:
                _, num_chars, _, num_bytes = self.spans[index - 1]
        held = HeldText("", b"", num_chars, num_bytes)
        return TextState(held, None, self.positions[:index], self.ordinals[:index], self.spans[:index])

    def copy(self) -> TextState:
        return TextState(self.held, self.foreign, self.positions[:], self.ordinals[:], self.spans[:])
