"""ForeignIds: ids of an LLM's own tokenizer to text, piece by piece. Knows nothing of Qwen3's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from guardengine.errors import ConfigError, InvalidTokens

# A character has at most four bytes, so an incomplete one has at most three. Decoders write one U+FFFD for it, or one
# for each byte.
_MAX_PARTIAL = 3
# Ids whose text was returned are kept as context, because decoders treat the first token of a text differently (they
# drop a space). When there are more than _MAX_CONTEXT of them, only the last _CONTEXT are kept.
_CONTEXT, _MAX_CONTEXT = 8, 40


class Decoder(Protocol):
    """The part of a tokenizer that is used here. `tokenizers.Tokenizer` and the tokenizers of transformers have it."""

    def decode(self, ids: Sequence[int], /) -> str: ...


class ForeignIds(NamedTuple):
    """The newest ids of one tokenizer, and how many characters of their text were returned. A value; `read` makes the
    next one.

    It is assumed that the text of the first ids is the beginning of the text of all ids, except for U+FFFD at its end.
    """

    tokenizer: Decoder
    ids: tuple[int, ...] = ()
    num_read: int = 0
    is_pending: bool = False  # the ids end within a character

    @staticmethod
    def begin(tokenizer: Any) -> ForeignIds:
        """Start with no ids. Raises ConfigError for a tokenizer that cannot decode."""
        if not callable(getattr(tokenizer, "decode", None)):
            raise ConfigError(
                f"tokenizer is {type(tokenizer).__name__}, which has no decode(ids); pass the LLM's tokenizer "
                "(tokenizers.Tokenizer, or one of transformers'), or decode yourself and use append_text"
            )
        return ForeignIds(tokenizer)

    def read(self, token_ids: Sequence[int]) -> tuple[str, ForeignIds]:
        """Decode more ids.

        Bytes that no further id can make valid UTF-8 become U+FFFD, as the tokenizer's decode writes them. Ids that
        decode leaves out (usually special tokens) are left out.

        Args:
            token_ids: The next ids.

        Returns:
            The text that these ids add, without a character that is not complete yet; and the state after them.

        Raises:
            InvalidTokens: The tokenizer refuses the ids.
        """
        ids = (*self.ids, *token_ids)
        text = self._decode(ids)
        partial = min(len(text) - len(text.rstrip("\ufffd")), _MAX_PARTIAL)
        end = max(len(text) - partial, self.num_read)
        piece = text[self.num_read : end]
        if len(ids) > _MAX_CONTEXT:
            if partial and len(ids) <= 2 * _MAX_CONTEXT:
                return piece, ForeignIds(self.tokenizer, ids, end, True)
            piece, partial = text[self.num_read :], 0  # so many U+FFFD are really in the text
            ids = ids[-_CONTEXT:]
            end = len(self._decode(ids))
        return piece, ForeignIds(self.tokenizer, ids, end, partial > 0)

    def rest(self) -> str:
        """The text of an incomplete character at the end: U+FFFD."""
        return self._decode(self.ids)[self.num_read :] if self.is_pending else ""

    def _decode(self, ids: tuple[int, ...]) -> str:
        try:
            return self.tokenizer.decode(list(ids))
        except Exception as error:  # it may be any tokenizer, with errors of any type
            raise InvalidTokens(
                f"{type(self.tokenizer).__name__}.decode refuses these ids ({type(error).__name__}: {error}); pass ids "
                "together with the tokenizer that they are of"
            ) from error
