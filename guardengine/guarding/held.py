"""How much of a reply was given, and how much of it may be shown: as text, as Qwen3 ids, or as another tokenizer's.

One of these goes with one reply on one stream, sync or async. It feeds nothing: its owner appends what it adds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from guardengine.core.text_feeding import accepted_chars
from guardengine.engine.stream import StreamView
from guardengine.text.foreign_ids import ForeignIds


class ShownText:
    """A reply that is fed as text. Made before its first piece is appended, with nothing on its way to the stream."""

    def __init__(self, stream: StreamView) -> None:
        self._stream = stream
        self._num_taken = accepted_chars(
            stream._state
        )  # of the reply's characters; those before are not ours
        self._text = ""  # given and not taken

    def add(self, delta: str) -> None:
        self._text += delta

    def take(self) -> str:
        """What is cleared by now of what was not taken yet."""
        return self._take(max(self._stream.cleared_chars - self._num_taken, 0))

    def rest(self) -> str:
        """All that was not taken yet: of a finished reply that is not blocked there is nothing left to wait for."""
        return self._take(len(self._text))

    def _take(self, num_chars: int) -> str:
        taken, self._text = self._text[:num_chars], self._text[num_chars:]
        self._num_taken += len(taken)
        return taken


class ShownIds:
    """A reply that is fed as Qwen3 ids."""

    def __init__(self, stream: StreamView) -> None:
        self._stream = stream
        self._num_taken = stream._state.num_assistant_tokens
        self._ids: list[int] = []

    def add(self, token_ids: Sequence[int]) -> None:
        self._ids += token_ids

    def take(self) -> list[int]:
        return self._take(max(self._stream.verdict.cleared - self._num_taken, 0))

    def rest(self) -> list[int]:
        return self._take(len(self._ids))

    def _take(self, num_ids: int) -> list[int]:
        taken, self._ids = self._ids[:num_ids], self._ids[num_ids:]
        self._num_taken += len(taken)
        return taken


class ShownForeignIds:
    """A reply whose ids are of another tokenizer: it is fed as their text, and shown as ids. An id may be shown when
    all of its text may; one that ends within a character waits for the one that completes it."""

    def __init__(self, stream: StreamView, tokenizer: Any) -> None:
        self._stream, self._foreign = stream, ForeignIds.begin(tokenizer)
        self._num_chars = accepted_chars(stream._state)  # of the reply
        self._ids: deque[tuple[int, int]] = deque()  # not taken: an id, and where its text ends
        self._incomplete: list[int] = []  # ids whose character is not complete

    def add(self, token_ids: Sequence[int]) -> str:
        """The text to append. Raises InvalidTokens for ids that the tokenizer refuses; nothing is added then."""
        foreign, pieces = self._foreign, list[tuple[str, bool]]()
        for token_id in token_ids:
            piece, foreign = foreign.read([token_id])
            pieces.append((piece, foreign.is_pending))
        self._foreign = foreign
        for token_id, (piece, is_pending) in zip(token_ids, pieces, strict=True):
            self._num_chars += len(piece)
            self._incomplete.append(token_id)
            if not is_pending:
                self._complete()
        return "".join(piece for piece, _ in pieces)

    def finish(self) -> str:
        """The text of a character that was never completed."""
        text, self._foreign = self._foreign.rest(), ForeignIds.begin(self._foreign.tokenizer)
        self._num_chars += len(text)
        self._complete()
        return text

    def take(self) -> list[int]:
        return self._take(self._stream.cleared_chars)

    def rest(self) -> list[int]:
        self._complete()
        return self._take(self._num_chars)

    def _complete(self) -> None:
        self._ids += [(token_id, self._num_chars) for token_id in self._incomplete]
        self._incomplete.clear()

    def _take(self, num_chars: int) -> list[int]:
        taken = []
        while self._ids and self._ids[0][1] <= num_chars:
            taken.append(self._ids.popleft()[0])
        return taken
