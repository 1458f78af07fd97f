"""Conversation: the client's side of one stream of the protocol guardengine.v1, over any number of connections. Does
no I/O.

It keeps what was sent, so that a new connection can continue after one was lost: the server computes the stream again
and sends the labels that had not arrived. Operations are done one after the other.
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
    """The result of one operation on a stream.

    Attributes:
        labels: The labels that are new, in order. Each is the server's object with position, token_id, risk, category,
            risk_probs, category_probs and span.
        verdict: The verdict after them, an object with action, risk, category, position, rule and cleared; see
            `guardengine.Verdict`.
        cleared_chars: How many characters of the reply may be shown.
        held_chars: How many characters at the end of the reply are not judged yet.
    """

    labels: list[Json]
    verdict: Json
    cleared_chars: int
    held_chars: int


class Conversation:
    """The history and the present state of a stream.

    Attributes:
        prompt: The label of the latest user turn, None before it has come or where it got none.
        labels: All labels of the reply's tokens, in order.
        verdict: The verdict after the latest operation.
        num_tokens: How many tokens the stream has, the template's included.
        num_labels: How many labels of replies the server has sent.
        cleared_chars: How many characters of the reply may be shown.
        held_chars: How many characters at the end of the reply are not judged yet.
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
            raise ConfigError("a stream needs either messages or token_ids: pass exactly one of them")
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
        """A copy for a branch: both go on independently."""
        branch = Conversation.__new__(Conversation)
        branch.__dict__ |= self.__dict__
        branch._past = [dict(past) for past in self._past]
        branch.labels = self.labels[:]
        return branch

    # -- what to send --------------------------------------------------------------------------------------

    def open_frame(self) -> Json:
        """The frame that opens the stream on a new connection, with everything that was done so far."""
        # The connection may have been lost before the server's answer to a rollback came.
        if self._past and self._past[-1]["type"] == "rollback":
            self._cut(self._past[-1]["to_num_tokens"])
        return {
            "type": "open",
            "stream": STREAM,
            **self._beginning,
            "history": self._past,
            "num_labels": self.num_labels,
        }

    def append(self, text: str | None, token_ids: Sequence[int] | None, role: str) -> Json:
        """The frame of an append. It counts as done from now on; `undo` takes it back."""
        content = {"text": text} if token_ids is None else {"token_ids": list(token_ids)}
        self._past.append({"type": "append", "role": role, **content})
        return {**self._past[-1], "stream": STREAM, "retry": True}

    def finish(self) -> Json:
        """The frame that ends the reply. It counts as done from now on; `undo` takes it back."""
        self._past.append({"type": "finish"})
        return {"type": "finish", "stream": STREAM, "retry": True}

    def rollback(self, num_tokens: int) -> Json:
        # The number that is kept means the same on the next connection.
        """The frame that drops tokens. It counts as done from now on; `undo` takes it back."""
        self._past.append({"type": "rollback", "to_num_tokens": max(0, self.num_tokens - num_tokens)})
        return {"type": "rollback", "stream": STREAM, "num_tokens": num_tokens}

    def undo(self) -> None:
        """Take the latest operation back, which the server has refused."""
        self._past.pop()

    def merge(self) -> None:
        """Join the latest text to the text before it, so that the history has one entry for both."""
        if len(self._past) < 2:
            return
        last, this = self._past[-2:]
        if "text" in last and "text" in this and last["role"] == this["role"] == "assistant":
            last["text"] += this["text"]
            self._past.pop()

    # -- what comes ----------------------------------------------------------------------------------------

    def receive(self, event: Json) -> None:
        """Record an event. Raises the error that an event of type "error" has, and ConnectionResetError when the
        server has closed the stream."""
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
        """Whether an event is the last one of an operation."""
        return event.get("type") in _ENDS

    def _cut(self, num_tokens: int) -> None:
        self.labels = [label for label in self.labels if label["position"] < num_tokens]

    def update(self, num_before: int) -> Update:
        """The present state, with the labels from index `num_before` on."""
        return Update(self.labels[num_before:], self.verdict, self.cleared_chars, self.held_chars)


class ConversationView:
    """The readable part of a stream, shared by both kinds of client: properties that read `conversation`."""

    conversation: Conversation

    @property
    def prompt(self) -> Json | None:
        """The label of the latest user turn, an object like those in `labels`; None where it got no label."""
        return self.conversation.prompt

    @property
    def labels(self) -> list[Json]:
        """All labels of the reply's tokens so far, in order."""
        return self.conversation.labels

    @property
    def verdict(self) -> Json:
        """The verdict after the latest operation: action, risk, category, position, rule and cleared."""
        return self.conversation.verdict

    @property
    def cleared_chars(self) -> int:
        """How many characters of the reply may be shown."""
        return self.conversation.cleared_chars
