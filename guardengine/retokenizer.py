"""Retokenizer: text in pieces to the ids of the whole text, each as soon as no continuation can change it.

A pure function from (what is held back, a piece) to (ids, their spans, what is held back then). What is cut where:

- At the ends of pre-tokens, the pieces that Qwen3's regular expression splits text into: ids never reach across. It
  looks ahead and not back, so a pre-token is settled once something follows that cannot belong to it; white space,
  once something else does.
- Between two letters, not both ASCII, that no token of the vocabulary has side by side: no merge can join them.
  Chinese and Japanese would else wait for the next punctuation mark.
- Only where Unicode normalization (NFC) joins nothing across: never before a combining mark, and the last character is
  held if a mark may follow it.
- By force, after MAX_HELD characters without any such place. What follows is tokenized as if a text began there, so
  only there can ids differ from those of the whole text.

Where it cuts by force depends on the text alone, so ids never depend on how it came in pieces. Held text is looked at
again with every piece, which costs no more than MAX_HELD characters do.
"""

from __future__ import annotations

import codecs
import re
from typing import NamedTuple

from guardengine.errors import CheckpointError
from guardengine.text_books import Held, Span
from guardengine.tokenizer import Tokenizer
from guardengine.unicode_rules import CharClasses, VocabularyPairs, is_ideograph, starts_unit

MAX_HELD = 256
_MAX_CACHED = 1 << 16  # pre-tokens; 20 MB at most
_MAX_CACHED_CHARS = 24
# Qwen3's split pattern over CharClasses' letters.
_PRE_TOKENS = re.compile(r"'(?:s|re|ll)|[O' _]?[Lsrel]+|N| ?[O']+n*|[ _n]*n+|[ _n]+(?![^ _n])|[ _n]+")
_LETTERS = frozenset("Lsrel")


class Fed(NamedTuple):
    """Ids that are settled, the span of each, and what is held back."""

    token_ids: list[int]
    spans: list[Span]
    held: Held


class _Piece(NamedTuple):
    """A pre-token's ids, and for each where it starts and ends in the pre-token's text."""

    token_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    num_chars: int
    num_bytes: int


class Retokenizer:
    """Makes ids of text that comes in pieces. Immutable but for what it remembers of text; for one thread at a time."""

    def __init__(self, tokenizer: Tokenizer, max_held: int = MAX_HELD) -> None:
        """Takes 0.1 to 0.2 s. Raises CheckpointError for a tokenizer.json that splits text in another way than
        Qwen3's."""
        if not tokenizer.splits_as_qwen3:
            raise CheckpointError(
                "tokenizer.json has another normalizer or pre_tokenizer than Qwen3's, so where text may be cut is "
                "not known; append Qwen3 token ids, or use the released tokenizer.json"
            )
        self._tokenizer, self._max_held = tokenizer, max_held
        self._classes = CharClasses(tokenizer.split)
        self._pairs = VocabularyPairs(tokenizer.vocabulary)
        self._pieces: dict[str, _Piece] = {}

    def feed(self, held: Held, delta: str | bytes, *, is_final: bool = False) -> Fed:
        """What `delta` settles of the text before it and its own; with `is_final` all of it.

        Bytes are UTF-8, which may be cut anywhere; what is not UTF-8 becomes U+FFFD, as readers see it. Raises
        InvalidText for other types and for lone surrogates.
        """
        text, partial = self._decode(held.partial, delta, is_final)
        text = held.text + text
        token_ids: list[int] = []
        spans: list[Span] = []
        start, num_chars, num_bytes = 0, held.num_chars, held.num_bytes
        while start < len(text):
            end = min(start + self._max_held, len(text))
            window = text[start:end]
            ends, raw_cut, settled = self._cut(window, is_final=is_final and end == len(text))
            if not raw_cut:
                if end == len(text):
                    break
                ends, raw_cut, settled = self._cut(window, is_final=True)
            num_bytes = self._encode(window, raw_cut, settled, ends, num_chars, num_bytes, token_ids, spans)
            num_chars += raw_cut
            start += raw_cut
        return Fed(token_ids, spans, Held(text[start:], partial, num_chars, num_bytes))

    def forget(self) -> None:
        """Forget the ids of pre-tokens. For benchmarks."""
        self._pieces.clear()

    # -- internals -----------------------------------------------------------------------------------------

    def _decode(self, partial: bytes, delta: str | bytes, is_final: bool) -> tuple[str, bytes]:
        """The whole characters, and the bytes of one that is not."""
        if isinstance(delta, bytes | bytearray | memoryview):
            data = partial + bytes(delta)
            text, num_read = codecs.utf_8_decode(data, "replace", is_final)
            return text, data[num_read:]
        self._tokenizer.check_text(delta)
        return ("\ufffd" + delta if partial and (delta or is_final) else delta), (
            b"" if delta or is_final else partial
        )

    def _cut(self, text: str, *, is_final: bool) -> tuple[list[int], int, str]:
        """Where the settled pre-tokens of `text` end in its normal form, how many characters of `text` that is, and
        the normal form."""
        normal = text if text.isascii() else self._tokenizer.normalize(text)
        classes = normal.translate(self._classes)
        ends = [match.end() for match in _PRE_TOKENS.finditer(classes)]
        if is_final or (classes[-1] == "N" and text[-1].isascii()):  # no mark composes with an ASCII digit
            return ends, len(text), normal
        size = len(classes)
        space_at = len(classes.rstrip(" _n"))
        ends.pop()  # more of the same may follow
        while ends and (ends[-2] if len(ends) > 1 else 0) >= space_at:  # white space that goes on to the end
            ends.pop()
        units = None if normal is text or normal == text else _unit_starts(text, self._tokenizer)
        last = ends[-1] if ends else 0
        if not normal.isascii() and classes[-1] in _LETTERS:
            for at in range(size - 1, last, -1):
                if classes[at] not in _LETTERS or classes[at - 1] not in _LETTERS:
                    break
                before, after = normal[at - 1], normal[at]
                if (before > "\x7f" or after > "\x7f") and not self._pairs.may_join(before, after):
                    cut = _unit_start(normal, units, at)
                    # The letter after the cut must be settled too: with a mark it may be another one.
                    if cut and (
                        is_ideograph(after) or (at + 1 < size and _unit_start(normal, units, at + 1))
                    ):
                        ends.append(at)
                        return ends, cut, normal
        while ends:
            if cut := _unit_start(normal, units, ends[-1]):
                return ends, cut, normal
            ends.pop()
        return ends, 0, normal

    def _encode(
        self,
        text: str,
        raw_cut: int,
        normal: str,
        ends: list[int],
        num_chars: int,
        num_bytes: int,
        token_ids: list[int],
        spans: list[Span],
    ) -> int:
        """Append the ids and spans of text[:raw_cut]; returns the number of the reply's bytes after it."""
        start = 0
        pieces = self._pieces
        if normal is text or normal == text:
            for end in ends:
                piece = pieces.get(word := normal[start:end]) or self._encode_piece(word)
                token_ids += piece.token_ids
                for first, last, first_byte, last_byte in piece.spans:
                    spans.append(
                        Span(
                            num_chars + first, num_chars + last, num_bytes + first_byte, num_bytes + last_byte
                        )
                    )
                num_chars += piece.num_chars
                num_bytes += piece.num_bytes
                start = end
            return num_bytes
        starts_of, ends_of, bytes_at = _alignment(text[:raw_cut], self._tokenizer)
        for end in ends:
            piece = pieces.get(word := normal[start:end]) or self._encode_piece(word)
            token_ids += piece.token_ids
            for first, last, _, _ in piece.spans:
                raw_start, raw_end = starts_of[start + first], ends_of[start + last - 1]
                spans.append(
                    Span(
                        num_chars + raw_start,
                        num_chars + raw_end,
                        num_bytes + bytes_at[raw_start],
                        num_bytes + bytes_at[raw_end],
                    )
                )
            start = end
        return num_bytes + bytes_at[raw_cut]

    def _encode_piece(self, word: str) -> _Piece:
        token_ids, offsets = self._tokenizer.encode_with_offsets(word)
        at = _byte_offsets(word)
        spans = tuple(Span(start, end, at[start], at[end]) for start, end in offsets)
        piece = _Piece(tuple(token_ids), spans, len(word), at[-1])
        if len(word) <= _MAX_CACHED_CHARS:
            if len(self._pieces) >= _MAX_CACHED:
                self._pieces.clear()
            self._pieces[word] = piece
        return piece


def _unit_start(normal: str, units: dict[int, int] | None, at: int) -> int:
    """The place in the text of place `at` in its normal form if normalization joins nothing across, else 0."""
    if units is not None:
        return units.get(at, 0)
    return at if starts_unit(normal, at) else 0


def _units(text: str) -> list[int]:
    """Where the pieces of a text end that are normalized independently."""
    return [at for at in range(1, len(text)) if starts_unit(text, at)] + [len(text)]


def _unit_starts(text: str, tokenizer: Tokenizer) -> dict[int, int]:
    """Places in the normal form where a unit starts -> in the text."""
    found, start, at = {}, 0, 0
    for end in _units(text):
        if start:
            found[at] = start
        at += len(tokenizer.normalize(text[start:end]))
        start = end
    return found


def _alignment(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """For each character of the normal form where it starts and ends in the text, or the unit that it is a part of
    where that is composed or reordered; and the byte offset of each of the text's characters."""
    starts: list[int] = []
    ends: list[int] = []
    start = 0
    for end in _units(text):
        normal = tokenizer.normalize(text[start:end])
        if normal == text[start:end]:
            starts += range(start, end)
            ends += range(start + 1, end + 1)
        else:
            starts += [start] * len(normal)
            ends += [end] * len(normal)
        start = end
    return starts, ends, _byte_offsets(text)


def _byte_offsets(text: str) -> list[int]:
    """The byte offset of each character in UTF-8, and of the end."""
    if text.isascii():
        return list(range(len(text) + 1))
    offsets = [0]
    for char in text:
        offsets.append(offsets[-1] + len(char.encode()))
    return offsets
