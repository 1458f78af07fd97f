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
from itertools import accumulate
from typing import NamedTuple

from guardengine.errors import CheckpointError
from guardengine.text.spans import HeldText, Offsets
from guardengine.text.tokenizer import Tokenizer
from guardengine.text.unicode_rules import CharClasses, PairCuts, is_ideograph, is_plain, starts_unit

MAX_HELD = 256
_MAX_CACHED = 1 << 16  # pre-tokens; 20 MB at most
_MAX_CACHED_CHARS = 24
# Qwen3's split pattern over CharClasses' letters.
_PRE_TOKENS = re.compile(r"'(?:s|re|ll)|[O' _]?[Lsrel]+|N| ?[O']+n*|[ _n]*n+|[ _n]+(?![^ _n])|[ _n]+")
_LETTERS = frozenset("Lsrel")
_FIRST_UNSPACED = "\u2e80"  # scripts that are written without spaces, from here on


class Fed(NamedTuple):
    """Ids that are settled, the span of each, and what is held back."""

    token_ids: list[int]
    spans: list[Offsets]
    held: HeldText


# A pre-token's ids, where each stands in its text, and how many characters and bytes that has.
_Piece = tuple[tuple[int, ...], tuple[Offsets, ...], int, int]


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
        self._pair_cuts = PairCuts(tokenizer.vocabulary)
        self._pieces: dict[str, _Piece] = {}

    def feed(self, held: HeldText, delta: str | bytes, *, is_final: bool = False) -> Fed:
        """What `delta` settles of the text before it and its own; with `is_final` all of it.

        Bytes are UTF-8, which may be cut anywhere; what is not UTF-8 becomes U+FFFD, as readers see it. Raises
        InvalidText for other types and for lone surrogates.
        """
        text, partial = self._decode(held.partial, delta, is_final)
        text = held.text + text
        fed = Fed([], [], held)
        start, size, num_chars, num_bytes = 0, len(text), held.num_chars, held.num_bytes
        is_done = not text
        while not is_done:
            end = min(start + self._max_held, size)
            window = text[start:end]
            is_done = end == size
            ends, cut, normal = self._cut(window, is_final=is_final and is_done)
            if not cut:
                if is_done:
                    break
                ends, cut, normal = self._cut(window, is_final=True)
            num_chars, num_bytes = self._encode(window[:cut], normal, ends, num_chars, num_bytes, fed)
            start += cut
        return Fed(fed.token_ids, fed.spans, HeldText(text[start:], partial, num_chars, num_bytes))

    def hold(self, held: HeldText, delta: str | bytes) -> HeldText:
        """What is held back when `delta` is not to settle anything yet. Raises as `feed`."""
        text, partial = self._decode(held.partial, delta, False)
        return held._replace(text=held.text + text, partial=partial)

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
        normal = text if text.isascii() or is_plain(text) else self._tokenizer.normalize(text)
        classes = normal.translate(self._classes)
        ends = list(accumulate(map(len, _PRE_TOKENS.findall(classes))))
        if is_final or (classes[-1] == "N" and text[-1].isascii()):  # no mark composes with an ASCII digit
            return ends, len(text), normal
        size = len(classes)
        space_at = len(classes.rstrip(" _n"))
        ends.pop()  # more of the same may follow
        while ends and (ends[-2] if len(ends) > 1 else 0) >= space_at:  # white space that goes on to the end
            ends.pop()
        units = None if normal is text or normal == text else _unit_starts(text, self._tokenizer)
        num_ends = len(ends)
        while num_ends and not _unit_start(normal, units, ends[num_ends - 1]):
            num_ends -= 1
        last = ends[num_ends - 1] if num_ends else 0
        if not normal.isascii():
            pair_cuts = self._pair_cuts
            for at in range(size - 1, last, -1):
                if (
                    classes[at] in _LETTERS
                    and classes[at - 1] in _LETTERS
                    and pair_cuts[normal[at - 1 : at + 1]]
                ):
                    cut, after = _unit_start(normal, units, at), normal[at]
                    # The letter after the cut must be settled too: with a mark it may be another one.
                    if cut and (
                        is_ideograph(after) or (at + 1 < size and _unit_start(normal, units, at + 1))
                    ):
                        return [*(end for end in ends if end < at), at], cut, normal
        return ends[:num_ends], _unit_start(normal, units, last) if last else 0, normal

    def _encode(
        self, text: str, normal: str, ends: list[int], num_chars: int, num_bytes: int, fed: Fed
    ) -> tuple[int, int]:
        """Append the ids and spans of `text`, whose normal form begins with pre-tokens that end at `ends`; returns how
        many characters and bytes the reply has by then."""
        words = self._words(normal, ends)
        pieces: list[_Piece | None] = list(map(self._pieces.get, words))
        num_unknown = pieces.count(None)
        if num_unknown > 1:  # one call of the library costs as much as two words
            known = self._learn(words)
        else:
            known = [piece or self._learn([word])[0] for piece, word in zip(pieces, words, strict=True)]
        token_ids, spans = fed.token_ids, fed.spans
        if normal.startswith(text):
            for ids, offsets, size, size_bytes in known:
                if len(ids) == 1:
                    token_ids.append(ids[0])
                    spans.append((num_chars, num_chars + size, num_bytes, num_bytes + size_bytes))
                else:
                    token_ids += ids
                    spans += [
                        (num_chars + start, num_chars + end, num_bytes + start_byte, num_bytes + end_byte)
                        for start, end, start_byte, end_byte in offsets
                    ]
                num_chars += size
                num_bytes += size_bytes
            return num_chars, num_bytes
        starts_of, ends_of, bytes_at = _alignment(text, self._tokenizer)
        word_start = 0
        for ids, offsets, size, _ in known:
            token_ids += ids
            for start, end, _, _ in offsets:
                start, end = starts_of[word_start + start], ends_of[word_start + end - 1]
                spans.append(
                    (
                        num_chars + start,
                        num_chars + end,
                        num_bytes + bytes_at[start],
                        num_bytes + bytes_at[end],
                    )
                )
            word_start += size
        return num_chars + len(text), num_bytes + bytes_at[-1]

    def _words(self, normal: str, ends: list[int]) -> list[str]:
        """The pre-tokens, cut further where no token reaches across: Chinese ones are clauses, which do not recur."""
        words, start = [], 0
        for end in ends:
            words.append(normal[start:end])
            start = end
        if normal.isascii():
            return words
        return [
            part
            for word in words
            for part in (self._pair_cuts.split(word) if word[-1] >= _FIRST_UNSPACED else (word,))
        ]

    def _learn(self, words: list[str]) -> list[_Piece]:
        """Encode successive words in one call, and remember each that is not too long."""
        if len(words) > 1 and words[-1].isspace() and words[-2].isspace():
            # A digit or the like follows, or else they were one word; without it they would be.
            return self._learn(words[:-1]) + self._learn(words[-1:])
        if len(self._pieces) >= _MAX_CACHED:
            self._pieces.clear()
        token_ids, offsets = self._tokenizer.encode_with_offsets("".join(words))
        learned: list[_Piece] = []
        index = start = 0
        for word in words:
            first, end = index, start + len(word)
            while index < len(offsets) and offsets[index][1] <= end:
                index += 1
            at = range(len(word) + 1) if word.isascii() else _byte_offsets(word)
            inside = tuple(
                (begin - start, stop - start, at[begin - start], at[stop - start])
                for begin, stop in offsets[first:index]
            )
            piece = tuple(token_ids[first:index]), inside, len(word), at[-1]
            if len(word) <= _MAX_CACHED_CHARS:
                self._pieces[word] = piece
            learned.append(piece)
            start = end
        return learned


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
