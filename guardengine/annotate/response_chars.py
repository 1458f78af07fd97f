"""ResponseChars: where a token of a response begins in the text of the data set."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from guardengine.text.tokenizer import Tokenizer

_TAGS = re.compile(r"</?think>")


class ResponseChars:
    """Maps tokens to characters with the checkpoint's tokenizer, which is read at the first use."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_dir(self._folder)

    def start_of(self, text: str, token_ids: Sequence[int], index: int) -> int | None:
        """The index in `text` of the first character of which a token has a byte.

        Args:
            text: The response as the data set has it.
            token_ids: The ids of the response as the chat template writes it: without newlines at the beginning, its
                first token perhaps joined with white space before it, with reasoning in the template's form.
            index: The token's index in `token_ids`; len(token_ids) is the <|im_end|> after them.

        Returns:
            The index; len(text) for the <|im_end|>; None for a token of reasoning that is not in `text`.
        """
        if index >= len(token_ids):
            return len(text)
        written = text.lstrip("\n")
        ids, offsets = self._tokenizer.encode_with_offsets(written)
        if ids == list(token_ids):
            return len(text) - len(written) + offsets[index][0]
        return self._align(text, token_ids, index)

    def _align(self, text: str, token_ids: Sequence[int], index: int) -> int | None:
        """The index for `start_of`, found by counting the characters that every template keeps: all but white space
        and the tags around reasoning."""
        tokenizer = self._tokenizer
        response = tokenizer.decode(token_ids)
        # Where a token ends within a character, decoding gives U+FFFD.
        before = _common_prefix(tokenizer.decode(token_ids[:index]), response)
        normal = tokenizer.normalize(text)
        num_before = len(_kept(before)) - (len(_kept(response)) - len(_kept(normal)))
        if num_before < 0:
            return None
        if normal == text:
            kept = _kept_places(text)
            return kept[num_before] if num_before < len(kept) else len(text)
        # The first character with which the normalized prefix becomes longer than the text before the token.
        ends = range(len(text) + 1)
        end = bisect_right(ends, num_before, key=lambda end: len(_kept(tokenizer.normalize(text[:end]))))
        return min(end - 1, len(text))


def _common_prefix(a: str, b: str) -> str:
    pairs = enumerate(zip(a, b, strict=False))
    return a[: next((place for place, pair in pairs if pair[0] != pair[1]), min(len(a), len(b)))]


def _kept(text: str) -> str:
    return "".join(_TAGS.sub("", text).split())


def _kept_places(text: str) -> list[int]:
    tags = [range(*match.span()) for match in _TAGS.finditer(text)]
    inside = {place for tag in tags for place in tag}
    return [place for place, char in enumerate(text) if not char.isspace() and place not in inside]
