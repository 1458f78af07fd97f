"""Deltas: what an LLM hands out piece by piece, in any shape; what of it is fed, and what may be shown."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from guardengine.engine.stream import StreamView
from guardengine.errors import ConfigError, InvalidText, InvalidTokens
from guardengine.guarding.held import ShownForeignIds, ShownIds, ShownText

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
    """One reply on one stream: deltas in, what to append out; and the part of it that may be shown, in their shape."""

    def __init__(self, stream: StreamView, shape: Shape) -> None:
        self._stream, self._shape = stream, shape
        self._shown: ShownText | ShownIds | ShownForeignIds | None = None  # None: nothing has come yet
        self._is_single = False  # deltas are ints

    def read(self, deltas: Iterable[Any]) -> str | list[int]:
        """The text or the ids of some deltas. Raises InvalidText or InvalidTokens for what is neither, or not what came
        before; ConfigError for a tokenizer that cannot decode."""
        text, ids = "", list[int]()
        for delta in deltas:
            value = self._value(delta)
            if isinstance(value, str):
                self._kind(ShownText, value)
                text += value
            elif value is not None:
                self._kind(ShownIds if self._shape.tokenizer is None else ShownForeignIds, value)
                ids += value
        return text if self._shown is None or isinstance(self._shown, ShownText) else ids

    def add(self, deltas: Iterable[Any]) -> str | list[int]:
        """What to append for some deltas, "" or [] for nothing. Raises as `read`, and InvalidTokens for ids that their
        tokenizer refuses."""
        delta = self.read(deltas)
        match self._shown:
            case ShownText() if isinstance(delta, str):
                self._shown.add(delta)
            case ShownIds() if not isinstance(delta, str):
                self._shown.add(delta)
            case ShownForeignIds() if not isinstance(delta, str):
                return self._shown.add(delta)
        return delta

    def finish(self) -> str:
        """What to append when no more comes."""
        return self._shown.finish() if isinstance(self._shown, ShownForeignIds) else ""

    def take(self) -> Sequence[Any]:
        """What may be shown by now of what was not taken yet: deltas, mostly one or none."""
        return [] if self._shown is None else self.shaped(self._shown.take())

    def rest(self) -> Sequence[Any]:
        """All that was not taken yet."""
        return [] if self._shown is None else self.shaped(self._shown.rest())

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

    def _kind(self, kind: type, value: object) -> None:
        if self._shown is None:
            if kind is ShownForeignIds:
                self._shown = ShownForeignIds(self._stream, self._shape.tokenizer)
            else:
                self._shown = ShownText(self._stream) if kind is ShownText else ShownIds(self._stream)
        elif type(self._shown) is not kind:
            raise InvalidText(f"a delta is {value!r:.80} after others of another kind; use text or ids only")

    def shaped(self, shown: str | list[int]) -> Sequence[Any]:
        """A part of the reply as deltas of the shape that they came in."""
        if not shown:
            return []
        return shown if self._is_single and not isinstance(shown, str) else [shown]
