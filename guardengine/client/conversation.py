"""Conversation: one stream of guardengine.v1 as its client sees it, over any number of connections. Does no I/O.

It keeps what was sent, so that after a lost connection the next one goes on: the server computes the stream again, and
sends the labels that had not come. Operations are done one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from guardengine.client.requests import Json, error_of
from guardengine.errors import ConfigError

PROTOCOL = "guardengine.v1"
STREAM = "stream"  # the id of the only one on its connection
_ENDS = {"labels", "finished", "rolled_back"}


class Update(NamedTuple):
    """What came of one operation: the labels that are new, as the server sends them, and where the reply is.

    verdict: action, risk, category, position, rule and cleared. cleared_chars: how many characters of the reply may be
    shown. held_chars: how many at its end are not judged yet.
    """

    labels: list[Json]
    verdict: Json
    cleared_chars: int
    held_chars: int


class Conversation:
    """A stream's past and present.

    prompt: the label of the latest user turn. labels: of the reply's tokens, all of them. verdict, cleared_chars: as of
    the latest operation.
    """

    def __init__(
        self,
        messages: Sequence[Mapping[str, Any]] | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        policy: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if (messages is None) == (token_ids is None):
            raise ConfigError("a stream needs either messages or token_ids")
        beginning = {
            "messages": None if messages is None else [dict(message) for message in messages],
            "token_ids": None if token_ids is None else list(token_ids),
            "policy": None if policy is None else dict(policy),
            **options,
        }
        self._beginning = {name: value for name, value in beginning.items() if value is not None}
        self._past: list[Json] = []
        self.prompt: Json | None = None
        self.labels: list[Json] = []
        self.verdict: Json = {}
        self.num_tokens = self.num_labels = self.cleared_chars = self.held_chars = 0

    def copy(self) -> Conversation:
        """A branch, which goes on by itself once it is opened."""
        branch = Conversation.__new__(Conversation)
        branch.__dict__ |= self.__dict__
        branch._past = [dict(past) for past in self._past]
        branch.labels = self.labels[:]
        return branch

    # -- what to send --------------------------------------------------------------------------------------

    def open_frame(self) -> Json:
        """What opens the stream on a new connection, as it is by now."""
        if (
            self._past and self._past[-1]["type"] == "rollback"
        ):  # which the lost connection may not have told of
            self._cut(self._past[-1]["to_num_tokens"])
        return {
            "type": "open",
            "stream": STREAM,
            **self._beginning,
            "history": self._past,
            "num_labels": self.num_labels,
        }

    def append(self, text: str | None, token_ids: Sequence[int] | None, role: str) -> Json:
        """The frame of an append, which counts as done from now on: see `undo`."""
        content = {"text": text} if token_ids is None else {"token_ids": list(token_ids)}
        self._past.append({"type": "append", "role": role, **content})
        return {**self._past[-1], "stream": STREAM, "retry": True}

    def finish(self) -> Json:
        self._past.append({"type": "finish"})
        return {"type": "finish", "stream": STREAM, "retry": True}

    def rollback(self, num_tokens: int) -> Json:
        # The number that is kept means the same on the next connection.
        self._past.append({"type": "rollback", "to_num_tokens": max(0, self.num_tokens - num_tokens)})
        return {"type": "rollback", "stream": STREAM, "num_tokens": num_tokens}

    def undo(self) -> None:
        """The latest operation was refused."""
        self._past.pop()

    def merge(self) -> None:
        """Text that was appended piece by piece is one piece of the past."""
        if len(self._past) < 2:
            return
        last, this = self._past[-2:]
        if "text" in last and "text" in this and last["role"] == this["role"] == "assistant":
            last["text"] += this["text"]
            self._past.pop()

    # -- what comes ----------------------------------------------------------------------------------------

    def receive(self, event: Json) -> None:
        """Take an event in. Raises the error that it tells of, and ConnectionResetError for the end of the stream."""
        kind = event.get("type")
        if kind == "error":
            raise error_of(event)
        if kind == "closed":
            raise ConnectionResetError(f"the server closed the stream: {event.get('reason')}")
        if kind in ("hello", "draining") or event.get("stream") != STREAM:
            return
        for name in ("num_tokens", "cleared_chars", "held_chars"):
            setattr(self, name, event.get(name, getattr(self, name)))
        self.verdict = event.get("verdict", self.verdict)
        if kind == "prompt":
            self.prompt = event["label"]
        if kind == "rolled_back":
            self._cut(self.num_tokens)
        if kind in _ENDS:
            self.labels += event["labels"]
            self.num_labels = event["num_labels"]

    @staticmethod
    def is_last(event: Json) -> bool:
        """Whether an event is the last of those that an operation is waited for."""
        return event.get("type") in _ENDS

    def _cut(self, num_tokens: int) -> None:
        self.labels = [label for label in self.labels if label["position"] < num_tokens]

    def update(self, num_before: int) -> Update:
        """What is new since there were so many labels."""
        return Update(self.labels[num_before:], self.verdict, self.cleared_chars, self.held_chars)


class ConversationView:
    """What can be read of a client's stream: its `conversation`, whichever way its operations wait."""

    conversation: Conversation

    @property
    def prompt(self) -> Json | None:
        return self.conversation.prompt

    @property
    def labels(self) -> list[Json]:
        return self.conversation.labels

    @property
    def verdict(self) -> Json:
        return self.conversation.verdict

    @property
    def cleared_chars(self) -> int:
        return self.conversation.cleared_chars
