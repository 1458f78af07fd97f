"""Deltas: what an LLM hands out piece by piece, in any shape; what of it is fed, and what may be shown."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from guardengine.engine.stream import StreamView
from guardengine.errors import ConfigError, InvalidText, InvalidTokens
from guardengine.guarding.held import HeldItems, cut_sequence
from guardengine.text.foreign_ids import ForeignIds

Extractor = Callable[[Any], Any]


class Shape(NamedTuple):
    """How to read deltas. text, ids: what to call on each for its text or ids (None: it has none). Without them deltas
    are str, int or lists of ints. tokenizer: whose the ids are, None for Qwen3's."""

    text: Extractor | None = None
    ids: Extractor | None = None
    tokenizer: Any = None

    def check(self) -> None:
        """Raise ConfigError for what contradicts itself."""
        if self.text is not None and self.ids is not None:
            raise ConfigError("text= and ids= were both given; a reply is fed as one of them")
        for name, extractor in (("text", self.text), ("ids", self.ids)):
            if extractor is not None and not callable(extractor):
                raise ConfigError(f"{name}={extractor!r}: a function of a delta is needed")
        if self.text is not None and self.tokenizer is not None:
            raise ConfigError("tokenizer= says whose ids the deltas are; with text= there are none")


class Reply:
    """One reply on one stream, sync or async: deltas in, what to append out; and the part of it that may be shown, in
    the shape that the deltas came in. It appends nothing itself.

    Text is held by characters, Qwen3's ids by tokens. Another tokenizer's ids are fed as their text, so they are held
    by its characters, and an id that ends within a character waits for the one that completes it.

    Args:
        stream: nothing may be on its way to it when the first delta is read.
        shape: how to read deltas.
        num_behind: how many cleared tokens are not shown yet, the newest ones.
    """

    def __init__(self, stream: StreamView, shape: Shape, num_behind: int = 0) -> None:
        self._stream, self._shape, self._num_behind = stream, shape, num_behind
        self._is_text: bool | None = None  # None: nothing has come yet
        self._is_single = False  # deltas are ints
        self._held = HeldItems[Any]()
        self._foreign: ForeignIds | None = None
        self._incomplete: list[int] = []  # another tokenizer's ids whose last character is not complete
        self._num_incomplete = 0  # characters of theirs that are

    def read(self, deltas: Iterable[Any]) -> str | list[int]:
        """The text or the ids of some deltas. Raises InvalidText or InvalidTokens for what is neither, or not what came
        before; ConfigError for a tokenizer that cannot decode."""
        text, ids = "", list[int]()
        for delta in deltas:
            value = self._value(delta)
            if value is None:
                continue
            if self._is_text is None:
                self._begin(isinstance(value, str))
            if isinstance(value, str) is not self._is_text:
                raise InvalidText(
                    f"a delta is {value!r:.80} after others of another kind; use text or ids only"
                )
            if isinstance(value, str):
                text += value
            else:
                ids += value
        return ids if self._is_text is False else text

    def add(self, deltas: Iterable[Any]) -> str | list[int]:
        """What to append for some deltas, "" or [] for nothing. Raises as `read`, and InvalidTokens for ids that their
        tokenizer refuses."""
        delta = self.read(deltas)
        if self._foreign is not None and not isinstance(delta, str):
            return self._add_foreign(self._foreign, delta)
        self._held.add(delta, len(delta))
        return delta

    def end(self) -> str:
        """What to append when no more comes: the text of a character that was never completed."""
        if self._foreign is None:
            return ""
        text, self._foreign = self._foreign.rest(), ForeignIds.begin(self._foreign.tokenizer)
        self._hold_incomplete(len(text))
        return text

    def take(self) -> Sequence[Any]:
        """What may be shown by now of what was not taken yet: deltas, mostly one or none."""
        num_tokens = max(self._stream.verdict.cleared - self._num_behind, 0)
        return self._shaped(self._held.take(self._end_of(num_tokens)))

    def rest(self) -> Sequence[Any]:
        """All that was not taken yet: of a finished reply that is not blocked there is nothing left to wait for."""
        return self._shaped(self._held.rest())

    def _end_of(self, num_tokens: int) -> int:
        """Where the first `num_tokens` assistant tokens of the stream end, in what the reply is held by."""
        is_by_token = self._is_text is False and self._foreign is None
        return num_tokens if is_by_token else self._stream.chars_within(num_tokens)

    def _begin(self, is_text: bool) -> None:
        self._is_text = is_text
        stream, tokenizer = self._stream, self._shape.tokenizer
        if is_text:
            self._held = HeldItems(cut_sequence, stream.accepted_chars)
        elif tokenizer is None:
            self._held = HeldItems(cut_sequence, stream.num_assistant_tokens)
        else:
            self._foreign = ForeignIds.begin(tokenizer)
            self._held = HeldItems(start=stream.accepted_chars)

    def _add_foreign(self, foreign: ForeignIds, token_ids: Sequence[int]) -> str:
        pieces = list[tuple[str, bool]]()
        for token_id in token_ids:
            piece, foreign = foreign.read([token_id])
            pieces.append((piece, foreign.is_pending))
        self._foreign = foreign
        for token_id, (piece, is_pending) in zip(token_ids, pieces, strict=True):
            self._incomplete.append(token_id)
            self._num_incomplete += len(piece)
            if not is_pending:
                self._hold_incomplete()
        return "".join(piece for piece, _ in pieces)

    def _hold_incomplete(self, num_more: int = 0) -> None:
        """They are complete now, with so many more characters."""
        self._held.add(self._incomplete, self._num_incomplete + num_more)
        self._incomplete, self._num_incomplete = [], 0

    def _shaped(self, parts: Sequence[Any]) -> Sequence[Any]:
        """Parts of the reply as deltas of the shape that they came in."""
        if self._is_text:
            text = "".join(parts)
            return [text] if text else []
        ids = [token_id for part in parts for token_id in part]
        return [ids] if ids and not self._is_single else ids

    def _value(self, delta: Any) -> str | list[int] | None:
        text, ids, _ = self._shape
        if text is not None:
            value = text(delta)
            if value is not None and not isinstance(value, str):
                raise InvalidText(f"text= returned {value!r:.80}; str or None is needed")
            return value
        value = delta if ids is None else ids(delta)
        if isinstance(value, str) and ids is None:
            return value
        if value is None and ids is not None:
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            self._is_single = True
            return [value]
        try:
            if isinstance(value, str | bytes | dict):
                raise TypeError
            return [operator.index(token_id) for token_id in value]
        except TypeError:
            raise InvalidTokens(
                f"a delta is {value!r:.80}, which is neither text nor token ids; pass text= or ids=, a function that "
                "takes them from a delta"
            ) from None
