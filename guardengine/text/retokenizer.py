"""Retokenizer: text in pieces to the ids of the whole text. Each id comes as soon as no later text can change it.

A pure function from (held-back text, a piece) to (ids, their spans, held-back text). Text can be cut:

- At the ends of pre-tokens, the pieces into which Qwen3's regular expression splits text: no token reaches across. The
expression looks ahead and not back, so a pre-token is final once a character follows that cannot belong to it; white
space is final once something else follows.
- Between two letters, not both ASCII, that no token of the vocabulary has side by side: no merge can join them.
Without this, Chinese and Japanese would wait for the next punctuation mark.
- Only where Unicode normalization (NFC) joins nothing across the cut: never before a combining mark, and the last
character is held back if a mark may follow it.
- By force, after MAX_HELD characters without any such place. The text after it is tokenized like the beginning of a
text, so only there can ids differ from those of the whole text.

Forced cuts depend on the text alone, so the ids never depend on how the text was cut into pieces. Held-back text is
looked at again with every piece, which costs no more than MAX_HELD characters.
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
_FIRST_UNSPACED = "\u2e80"  # from here on, scripts are written without spaces


class Fed(NamedTuple):
    """Ids that are final, the span of each, and the text that is held back."""

    token_ids: list[int]
    spans: list[Offsets]
    held: HeldText


# The ids of a pre-token, the place of each in its text, and how many characters and bytes the text has.
_Piece = tuple[tuple[int, ...], tuple[Offsets, ...], int, int]


class Retokenizer:
    """Makes ids of text that comes in pieces. It keeps only caches, and several threads may use it: what
    one of them adds to a cache or takes out of it changes no result of another."""

    def __init__(self, tokenizer: Tokenizer, max_held: int = MAX_HELD) -> None:
        """Takes 0.1 to 0.2 s. Raises CheckpointError for a tokenizer.json that splits text in another way than
        Qwen3's."""
        if not tokenizer.splits_as_qwen3:
            raise CheckpointError(
                "tokenizer.json has another normalizer or pre_tokenizer than Qwen3's, so it is not known "
                "where text can be cut; append Qwen3 token ids, or use the released tokenizer.json"
            )
        self._tokenizer, self._max_held = tokenizer, max_held
        self._classes = CharClasses(tokenizer.split)
        self._pair_cuts = PairCuts(tokenizer.vocabulary)
        self._pieces: dict[str, _Piece] = {}

    def feed(self, held: HeldText, delta: str | bytes, *, is_final: bool = False) -> Fed:
        """The ids that become final with more text.

        Args:
            held: The text that was held back before.
            delta: More text. Bytes are UTF-8 and may be cut anywhere; bytes that are not UTF-8 become U+FFFD, as
                readers see it.
            is_final: The text ends here, so nothing is held back.

        Raises:
            InvalidText: `delta` has another type, or lone surrogates.
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
        """Append `delta` to the held-back text without making ids. Raises InvalidText like `feed`."""
        text, partial = self._decode(held.partial, delta, False)
        return held._replace(text=held.text + text, partial=partial)

    def forget(self) -> None:
        """Empty the cache of pre-tokens. For benchmarks."""
        self._pieces.clear()

    # -- internals -----------------------------------------------------------------------------------------

    def _decode(self, partial: bytes, delta: str | bytes, is_final: bool) -> tuple[str, bytes]:
        """The whole characters in `delta`, and the bytes of an incomplete one."""
        if isinstance(delta, bytes | bytearray | memoryview):
            data = partial + bytes(delta)
            text, num_read = codecs.utf_8_decode(data, "replace", is_final)
            return text, data[num_read:]
        self._tokenizer.check_text(delta)
        return ("\ufffd" + delta if partial and (delta or is_final) else delta), (
            b"" if delta or is_final else partial
        )

    def _cut(self, text: str, *, is_final: bool) -> tuple[list[int], int, str]:
        """The ends of the final pre-tokens of `text` in its normal form, how many characters of `text` they are, and
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
                    # The letter after the cut must be final too, because a mark may follow that changes it.
                    if cut and (
                        is_ideograph(after) or (at + 1 < size and _unit_start(normal, units, at + 1))
                    ):
                        return [*(end for end in ends if end < at), at], cut, normal
        return ends[:num_ends], _unit_start(normal, units, last) if last else 0, normal

    def _encode(
        self, text: str, normal: str, ends: list[int], num_chars: int, num_bytes: int, fed: Fed
    ) -> tuple[int, int]:
        """Append the ids and spans of `text`, whose normal form begins with pre-tokens that end at `ends`. Returns how
        many characters and bytes the reply has then."""
        words = self._words(normal, ends)
        pieces: list[_Piece | None] = list(map(self._pieces.get, words))
        num_unknown = pieces.count(None)
        if num_unknown > 1:  # a call of the library costs as much as two words
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
        """The pre-tokens, cut further where no token reaches across. Chinese pre-tokens are whole clauses, which
        hardly ever occur twice."""
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
        """Encode consecutive words in one call, and cache each that is not too long."""
        if len(words) > 1 and words[-1].isspace() and words[-2].isspace():
            # They are two words because of what follows, such as a digit; encoded alone they would be one.
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
    """The place in the text for the place `at` in its normal form, when normalization joins nothing across it; else
    0."""
    if units is not None:
        return units.get(at, 0)
    return at if starts_unit(normal, at) else 0


def _units(text: str) -> list[int]:
    """The ends of the pieces of a text that are normalized independently."""
    return [at for at in range(1, len(text)) if starts_unit(text, at)] + [len(text)]


def _unit_starts(text: str, tokenizer: Tokenizer) -> dict[int, int]:
    """Places in the normal form where a unit starts -> their places in the text."""
    found, start, at = {}, 0, 0
    for end in _units(text):
        if start:
            found[at] = start
        at += len(tokenizer.normalize(text[start:end]))
        start = end
    return found


def _alignment(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """For each character of the normal form where it starts and ends in the text (a composed or reordered unit counts
    as a whole); and the byte offset of each character of the text."""
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
    """The byte offset in UTF-8 of each character, and of the end."""
    if text.isascii():
        return list(range(len(text) + 1))
    offsets = [0]
    for char in text:
        offsets.append(offsets[-1] + len(char.encode()))
    return offsets
