"""ForeignIds: the ids of an LLM's own tokenizer to text, piece by piece. Knows nothing of Qwen3's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from guardengine.errors import ConfigError, InvalidTokens

# A character is at most four bytes, so three of them can be the beginning of one. Decoders write U+FFFD for it, one or
# one for each byte.
_MAX_PARTIAL = 3
# Ids whose text is out stay as context, because decoders treat a text's first token differently (a space less). They
# are cut to the fewer ones when there are more of them.
_CONTEXT, _MAX_CONTEXT = 8, 40


class Decoder(Protocol):
    """What is needed of a tokenizer: `tokenizers.Tokenizer` and transformers' tokenizers have it."""

    def decode(self, ids: Sequence[int], /) -> str: ...


class ForeignIds(NamedTuple):
    """The latest ids of one tokenizer, and how many characters of their text are out. A value; `read` makes the next.

    The text of a prefix of ids is taken to be a prefix of their text, but for U+FFFD at its end.
    """

    tokenizer: Decoder
    ids: tuple[int, ...] = ()
    num_read: int = 0
    is_pending: bool = False  # the ids end within a character

    @staticmethod
    def begin(tokenizer: Any) -> ForeignIds:
        """Raises ConfigError for what cannot decode."""
        if not callable(getattr(tokenizer, "decode", None)):
            raise ConfigError(
                f"tokenizer is {type(tokenizer).__name__}, which has no decode(ids); pass the LLM's tokenizer "
                "(tokenizers.Tokenizer, or one of transformers'), or decode yourself and use append_text"
            )
        return ForeignIds(tokenizer)

    def read(self, token_ids: Sequence[int]) -> tuple[str, ForeignIds]:
        """The text that these ids add, without a character that is not complete, and where that leaves us.

        Bytes that no id can make into UTF-8 any more become U+FFFD, as the tokenizer's decode writes them; what that
        leaves out (special tokens, as a rule) is left out. Raises InvalidTokens for ids that it refuses.
        """
        ids = (*self.ids, *token_ids)
        text = self._decode(ids)
        partial = min(len(text) - len(text.rstrip("\ufffd")), _MAX_PARTIAL)
        end = max(len(text) - partial, self.num_read)
        piece = text[self.num_read : end]
        if len(ids) > _MAX_CONTEXT:
            if partial and len(ids) <= 2 * _MAX_CONTEXT:
                return piece, ForeignIds(self.tokenizer, ids, end, True)
            piece, partial = text[self.num_read :], 0  # U+FFFD that never ends is meant
            ids = ids[-_CONTEXT:]
            end = len(self._decode(ids))
        return piece, ForeignIds(self.tokenizer, ids, end, partial > 0)

    def rest(self) -> str:
        """The text of an incomplete character: U+FFFD."""
        return self._decode(self.ids)[self.num_read :] if self.is_pending else ""

    def _decode(self, ids: tuple[int, ...]) -> str:
        try:
            return self.tokenizer.decode(list(ids))
        except Exception as error:  # any tokenizer's, so any error
            raise InvalidTokens(
                f"{type(self.tokenizer).__name__}.decode refuses these ids ({type(error).__name__}: {error}); pass ids "
                "together with the tokenizer that they are of"
            ) from error
