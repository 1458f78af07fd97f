"""The load of a soak: conversations that come and go as in production, with a check of every label.

It is an open loop: conversations arrive as a Poisson process, and their tokens arrive on time, whatever the engine
does. A conversation is a prompt (one in three begins with one of a few system prompts; 2% have about 8k tokens), then
a reply in bursts of 1 to 4 tokens, some of which are rolled back or continued in a fork; one in five conversations is
dropped in the middle. A finished conversation stays open and idle, until it continues with another turn, is closed, or
is closed by idle_ttl_s.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from guardengine.engine.engine import Engine
from guardengine.engine.stream import Stream
from guardengine.errors import IntegrityError, Overloaded, StreamTooLong
from guardengine.labels import Label

_LONG_SHARE, _LONG_TOKENS = 0.02, 8000
_SYSTEM_SHARE, _SYSTEM_PROMPTS, _SYSTEM_TOKENS = 1 / 3, 8, 96
_FORK_SHARE, _ROLLBACK_SHARE = 0.01, 0.02  # of bursts
_CANCEL_SHARE, _ABANDON_SHARE, _CONTINUE_SHARE = 0.2, 0.1, 0.3  # of conversations
MEAN_REPLY_TOKENS = 64
_MOST_PROMPT_TOKENS = 1000


@dataclass(slots=True)
class Counts:
    """The operations on the engine, and those that it refused."""

    conversations: int = 0
    labels: int = 0
    refused_open: int = 0
    refused_append: int = 0
    forks: int = 0
    rollbacks: int = 0
    cancelled: int = 0
    continued: int = 0
    expired: int = 0


@dataclass(slots=True, eq=False)
class Conversation:
    """One stream of the load, and the labels that it must still get: one for each reply token, in order."""

    stream: Stream
    reply_left: int
    owed: deque[range] = field(default_factory=deque)  # positions whose label is to come
    arrivals: deque[tuple[int, float]] = field(default_factory=deque)  # (end of a burst, when it was due)


class _Event(NamedTuple):
    due: float
    number: int
    kind: str
    conversation: Conversation | None


class Load:
    """The load on an engine: `arrivals_per_s` conversations a second, each with `tokens_per_s` reply tokens a
    second."""

    def __init__(
        self,
        engine: Engine,
        *,
        vocab_size: int,
        arrivals_per_s: float,
        tokens_per_s: float,
        idle_s: float,
        seed: int,
    ) -> None:
        self.counts = Counts()
        self.latencies: list[tuple[float, float]] = []  # (when, seconds from due to label) of bursts
        self._engine, self._rng = engine, np.random.default_rng(seed)
        self._longest = engine.stats()["max_model_len"]
        self._vocab_size = min(vocab_size, 151643)
        self._arrivals_per_s, self._tokens_per_s, self._idle_s = arrivals_per_s, tokens_per_s, idle_s
        self._systems = [self._ids(min(_SYSTEM_TOKENS, self._longest // 8)) for _ in range(_SYSTEM_PROMPTS)]
        self._events: list[_Event] = []
        self._numbers = itertools.count()
        self._by_stream: dict[str, Conversation] = {}
        self._schedule(0.0, "arrive")

    @property
    def next_due(self) -> float:
        return self._events[0].due

    def feed(self, now: float) -> None:
        """Do everything that is due by `now`."""
        while self._events[0].due <= now:
            due, _, kind, conversation = heapq.heappop(self._events)
            try:
                if conversation is None:
                    self._arrive(due)
                elif conversation.stream.is_closed:  # by idle_ttl_s: nobody came back to it in time
                    self._forget(conversation)
                    self.counts.expired += 1
                else:
                    getattr(self, f"_{kind}")(conversation, due)
            except Overloaded:
                self.counts.refused_append += conversation is not None
                if conversation is not None:  # come back later
                    self._schedule(due + 4 / self._tokens_per_s, kind, conversation)
            except StreamTooLong:
                if conversation is not None:
                    self._close(conversation, due)

    def deliver(self, labels: Sequence[Label], now: float | None) -> None:
        """Check labels, and record the time of the bursts that they complete. With None for the time, nothing is
        recorded, because the soak is over.

        Raises IntegrityError for a label that came twice, is missing, is out of order, or belongs to no stream.
        """
        self.counts.labels += len(labels)
        for label in labels:
            conversation = self._by_stream.get(label.stream_id)
            if conversation is None:
                raise IntegrityError(f"a label for {label.stream_id}, which is not open")
            if label.role == "user":
                continue
            owed = conversation.owed
            if not owed or label.position != owed[0].start:
                raise IntegrityError(f"{label.stream_id}: label at {label.position}, owed are {list(owed)}")
            owed[0] = owed[0][1:]
            if not owed[0]:
                owed.popleft()
            arrivals = conversation.arrivals
            if arrivals and label.position == arrivals[0][0] - 1:
                _, due = arrivals.popleft()
                if now is not None:
                    self.latencies.append((now, now - due))

    def finish(self) -> None:
        """Run what is pending, check that no label is missing, and close everything."""
        self.deliver(self._engine.run(), None)
        for conversation in list(self._by_stream.values()):
            stream = conversation.stream
            if not stream.is_closed and (conversation.owed or conversation.arrivals):
                raise IntegrityError(f"{stream.stream_id}: labels at {list(conversation.owed)} did not come")
            self._forget(conversation)

    # -- what happens --------------------------------------------------------------------------------------

    def _arrive(self, due: float) -> None:
        self._schedule(due + self._rng.exponential(1 / self._arrivals_per_s), "arrive")
        if self._rng.random() < _LONG_SHARE:
            ids = self._ids(min(_LONG_TOKENS, self._longest // 2))
        else:
            size = min(8 + int(self._rng.lognormal(4.0, 0.8)), _MOST_PROMPT_TOKENS, self._longest // 4)
            ids = self._ids(size)
        if self._rng.random() < _SYSTEM_SHARE:
            ids = self._systems[self._rng.integers(_SYSTEM_PROMPTS)] + ids
        self.counts.conversations += 1
        try:
            stream = self._engine.open(token_ids=ids)
        except Overloaded:
            self.counts.refused_open += 1
            return
        self._add(stream, self._reply_tokens(), due)

    def _append(self, conversation: Conversation, due: float) -> None:
        size = min(int(self._rng.integers(1, 5)), conversation.reply_left)
        stream = conversation.stream
        stream.append(self._ids(size))
        conversation.reply_left -= size
        end = stream.num_tokens
        conversation.owed.append(range(end - size, end))
        conversation.arrivals.append((end, due))
        draw = self._rng.random()
        if draw < _FORK_SHARE:
            self._fork(conversation, due)
        elif draw < _FORK_SHARE + _ROLLBACK_SHARE:
            self._roll_back(conversation, size)
        if conversation.reply_left:
            self._schedule(due + self._rng.exponential(size / self._tokens_per_s), "append", conversation)
            return
        idle_s = float(self._rng.exponential(self._idle_s))
        draw = self._rng.random()
        if draw < _CANCEL_SHARE:  # the client goes away with labels pending
            self._close(conversation, due)
            self.counts.cancelled += 1
        elif draw < _CANCEL_SHARE + _CONTINUE_SHARE:
            self._schedule(due + idle_s, "resume", conversation)
        else:
            leaves = draw > 1 - _ABANDON_SHARE  # without closing: idle_ttl_s is for these
            self._schedule(due + (100 * self._idle_s if leaves else idle_s), "close", conversation)

    def _resume(self, conversation: Conversation, due: float) -> None:
        stream = conversation.stream
        stream.append(self._ids(16), role="user")
        conversation.reply_left = self._reply_tokens()
        self.counts.continued += 1
        self._schedule(due + self._rng.exponential(1 / self._tokens_per_s), "append", conversation)

    def _close(self, conversation: Conversation, due: float) -> None:
        self._forget(conversation)

    def _fork(self, conversation: Conversation, due: float) -> None:
        try:
            branch = conversation.stream.fork()
        except Overloaded:
            self.counts.refused_append += 1
            return
        twin = self._add(branch, 8, due)
        twin.owed, twin.arrivals = deque(conversation.owed), deque(conversation.arrivals)
        self.counts.forks += 1

    def _roll_back(self, conversation: Conversation, size: int) -> None:
        conversation.stream.rollback(size)
        conversation.arrivals.pop()
        conversation.owed.pop()  # a burst that was appended just now
        self.counts.rollbacks += 1

    # -- the books -----------------------------------------------------------------------------------------

    def _add(self, stream: Stream, reply_left: int, due: float) -> Conversation:
        conversation = Conversation(stream, reply_left)
        self._by_stream[stream.stream_id] = conversation
        self._schedule(due + self._rng.exponential(1 / self._tokens_per_s), "append", conversation)
        return conversation

    def _forget(self, conversation: Conversation) -> None:
        conversation.stream.close()
        del self._by_stream[conversation.stream.stream_id]

    def _schedule(self, due: float, kind: str, conversation: Conversation | None = None) -> None:
        heapq.heappush(self._events, _Event(due, next(self._numbers), kind, conversation))

    def _reply_tokens(self) -> int:
        return 1 + int(self._rng.geometric(1 / MEAN_REPLY_TOKENS))

    def _ids(self, size: int) -> list[int]:
        ids: list[int] = self._rng.integers(self._vocab_size, size=size).tolist()
        return ids
