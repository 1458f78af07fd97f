"""TextBooks: what a stream knows of the text behind its tokens. Plain data; no tokenizer, no engine.

Part of a StreamState, so that fork copies it and rollback truncates it with everything else.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import NamedTuple

from guardengine.foreign_ids import ForeignIds


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


@dataclass(slots=True)
class TextBooks:
    """The text of one stream: what of the current reply is held back, and the spans of tokens that came from text."""

    held: Held = field(default_factory=Held)
    foreign: ForeignIds | None = None  # where the ids of another tokenizer were left
    positions: array[int] = field(default_factory=lambda: array("i"))  # of these tokens, ascending
    spans: list[Offsets] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether anything was accepted that no token stands for yet."""
        return not self.held.is_empty or (self.foreign is not None and self.foreign.is_pending)

    def extend(self, start: int, spans: list[Offsets]) -> None:
        """Record the spans of the tokens at `start` and after."""
        self.positions.extend(range(start, start + len(spans)))
        self.spans += spans

    def span(self, position: int) -> Span | None:
        index = bisect_left(self.positions, position)
        found = index < len(self.positions) and self.positions[index] == position
        return Span(*self.spans[index]) if found else None

    def chars_before(self, reply_start: int, position: int | None) -> int:
        """How many characters of the reply that begins at `reply_start` are wholly in tokens before `position`
        (None: in any token)."""
        first = bisect_left(self.positions, reply_start)
        if first == len(self.positions):
            return 0
        index = len(self.spans) if position is None else bisect_left(self.positions, position, lo=first)
        return self.held.num_chars if index == len(self.spans) else self.spans[index][0]

    def truncate(self, num_tokens: int) -> None:
        """Forget what is held, and all tokens from position `num_tokens` on. A character that is cut counts as gone."""
        self.foreign = None
        index = bisect_left(self.positions, num_tokens)
        _, _, num_chars, num_bytes = self.held
        if index < len(self.spans):
            num_chars, _, num_bytes, _ = self.spans[index]
            # The first token of a later reply; templates stand between two replies.
            if index and not num_chars and self.positions[index - 1] + 1 != self.positions[index]:
                _, num_chars, _, num_bytes = self.spans[index - 1]
            del self.positions[index:], self.spans[index:]
        self.held = Held("", b"", num_chars, num_bytes)

    def copy(self) -> TextBooks:
        return TextBooks(self.held, self.foreign, self.positions[:], self.spans[:])
