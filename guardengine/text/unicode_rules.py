"""Properties of single characters and of pairs of them: the classes of Qwen3's split pattern, what Unicode
normalization may join, and which letters are side by side in a token.

The classes come from the tokenizers library itself, whose version of Unicode may differ from Python's. For
normalization Python's tables are used, and a character that they do not have is assumed to join with anything.
"""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import compress, count

Split = Callable[[str], list[tuple[str, tuple[int, int]]]]

_MAX_KNOWN = 1 << 17  # characters; 15 MB at most
_LAST_CASED = 0x250  # letters from here on have no case of 's, 't, 're, ...
_BLOCK = 256


class CharClasses(dict[int, str]):
    """Code point -> the letter of its class, filled in as characters occur. For str.translate.

    L is a letter, N a number, O any other character, ' ' a space, _ other white space, n a carriage return or newline,
    ' an apostrophe. The letters of the contractions that the pattern knows have classes of their own, in either case:
    s for s, t, m and d; r for r and v; e; l.
    """

    def __init__(self, split: Split) -> None:
        super().__init__({ord(" "): " ", ord("'"): "'", ord("\r"): "n", ord("\n"): "n"})
        self._split = split

    def __missing__(self, code: int) -> str:
        if len(self) >= _MAX_KNOWN:
            for other in list(self)[4:]:
                self.pop(other, None)  # another thread may do the same
        if code >= _LAST_CASED:
            first = code - code % _BLOCK
            block = [c for c in range(first, first + _BLOCK) if not 0xD800 <= c < 0xE000]
            if self._first("x" + "".join(map(chr, block))) == len(block) + 1:
                self.update(dict.fromkeys(block, "L"))
                return "L"
        self[code] = kind = self._ask(chr(code))
        return kind

    def _ask(self, char: str) -> str:
        first = self._first
        if first("x" + char) == 2:
            if ord(char) < _LAST_CASED:
                for letter, text, size in (
                    ("s", f"'{char}x", 2),
                    ("r", f"'{char}ex", 3),
                    ("e", f"'r{char}x", 3),
                    ("l", f"'l{char}x", 3),
                ):
                    if first(text) == size:
                        return letter
            return "L"
        if first(char + "!") == 2:
            return "O"
        return "_" if first(char + "\n") == 2 else "N"

    def _first(self, text: str) -> int:
        """How many characters the first pre-token has."""
        return self._split(text)[0][1][1]


class PairCuts(dict[str, bool]):
    """Two characters -> whether text may be cut between them, because they are not both ASCII and no token of the
    vocabulary has them side by side. Filled in as pairs occur."""

    def __init__(self, vocabulary: Iterable[bytes]) -> None:
        super().__init__()
        # Where a token has only a part of a character, each of its bytes becomes a lone surrogate.
        text = b"\xff".join(token for token in vocabulary if not token.isascii())
        chars = text.decode("utf-8", "surrogateescape")
        self._pairs = {pair for pair in map(operator.add, chars, chars[1:]) if not pair.isascii()}

    def __missing__(self, pair: str) -> bool:
        if len(self) >= _MAX_KNOWN:
            self.clear()
        self[pair] = may_cut = not (pair.isascii() or self._may_join(*pair))
        return may_cut

    def split(self, text: str) -> list[str]:
        """A text cut at every place where it may be."""
        cuts = list(compress(count(1), map(self.__getitem__, map(operator.add, text, text[1:]))))
        if not cuts:
            return [text]
        return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def _may_join(self, before: str, after: str) -> bool:
        """Whether some token may have both the last byte of `before` and the first byte of `after`. Such a token has
        `before` or begins within it, and has `after` or ends within it."""
        pairs = self._pairs
        if before + after in pairs:
            return True
        last = before if before < "\x80" else chr(0xDC00 + before.encode()[-1])
        first = after if after < "\x80" else chr(0xDC00 + after.encode()[0])
        return last + after in pairs or before + first in pairs or last + first in pairs


def starts_unit(text: str, at: int) -> bool:
    """Whether NFC treats text[:at] and text[at:] independently, whatever follows."""
    char = text[at]
    if "0" <= text[at - 1] <= "9":  # nothing composes with a digit, and nothing moves before one
        return True
    if char < "\u0300":
        return text[at - 1] < "\u0300" or not _is_unknown(text[at - 1])
    return not _may_join_back(char) and not _is_unknown(text[at - 1])


# Characters that NFC leaves unchanged, and that compose with none of each other: no combining marks, no vowels and
# finals of Hangul, and no characters whose canonical decomposition is not composed again.
_PLAIN = re.compile(
    "[\x00-\u02ff\u0400-\u0482\u2010-\u2027\u2030-\u205e\u3001-\u3029\u3041-\u3096\u309b-\u30ff"
    "\u4e00-\u9fff\uac00-\ud7a3\uff01-\uff60]*"
)


def is_plain(text: str) -> bool:
    """Whether a text is its own normal form because it has ordinary characters only. Much faster than normalizing
    it."""
    return _PLAIN.fullmatch(text) is not None


def is_ideograph(char: str) -> bool:
    """Whether this is one of the common Chinese characters, with which no mark composes."""
    return "\u4e00" <= char <= "\u9fff"


@lru_cache(maxsize=4096)
def _is_unknown(char: str) -> bool:
    return unicodedata.category(char) == "Cn"


@lru_cache(maxsize=4096)
def _may_join_back(char: str) -> bool:
    """Whether NFC may compose this character with the one before it, or move it."""
    return (
        unicodedata.combining(char) != 0
        or "\u1160" <= char <= "\u11ff"  # vowels and finals of Hangul, which compose by rule
        or char in _seconds()
        or _is_unknown(char)
    )


@lru_cache(maxsize=1)
def _seconds() -> frozenset[str]:
    """The characters that compose with one before them, or decompose into one that does."""
    decomposed: dict[str, str] = {}
    for code in range(0x300, 0x20000):  # no composition has characters beyond
        rule = unicodedata.decomposition(chr(code))
        if rule and rule[0] != "<":
            decomposed[chr(code)] = unicodedata.normalize("NFD", chr(code))
    seconds = {char for code in range(0xC0, 0x300) for char in unicodedata.normalize("NFD", chr(code))[1:]}
    for text in decomposed.values():
        seconds.update(text[1:])
    joins = {
        char for char, text in decomposed.items() if unicodedata.combining(text[0]) or text[0] in seconds
    }
    return frozenset(seconds | joins)
