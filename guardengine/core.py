"""EngineCore: the runtime over token ids. Accepts and drops tokens, and steps all streams in one batch.

`step()` is the whole story. Everything else changes one stream's books, and checks before it changes anything.
Knows no text, no files and no devices; single-threaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from guardengine.batch import build_batch
from guardengine.block_pool import BlockPool
from guardengine.config import ModelConfig
from guardengine.conversation import Feed, cut_turns
from guardengine.errors import ConfigError, InvalidTokens, Overloaded, StreamClosed, StreamTooLong
from guardengine.labels import Label
from guardengine.policy import Policy
from guardengine.readout import Readout
from guardengine.runner import Runner
from guardengine.scheduler import Scheduler
from guardengine.state import StreamState


class EngineCore:
    """Streams, their KV blocks and the queue of pending tokens around one Runner."""

    def __init__(
        self,
        config: ModelConfig,
        runner: Runner,
        readout: Readout,
        pool: BlockPool,
        *,
        max_model_len: int,
        max_num_streams: int,
        max_num_batched_tokens: int,
    ) -> None:
        self.runner, self.pool = runner, pool
        self.max_model_len, self.max_num_streams = max_model_len, max_num_streams
        self.streams: dict[str, StreamState] = {}
        self.counters = dict.fromkeys(
            ("steps", "tokens_computed", "labels", "streams_opened", "forks", "rollbacks", "refused"), 0
        )
        self._vocab_size = config.vocab_size
        self._readout = readout
        self._scheduler = Scheduler(max_num_batched_tokens)
        self._next_id = itertools.count()
        self._undelivered: list[Label] = []  # of bystanders, from `run_until_computed`
        self._is_closed = False

    # -- the step ------------------------------------------------------------------------------------------

    @property
    def num_pending_tokens(self) -> int:
        return self._scheduler.num_pending_tokens

    def step(self) -> list[Label]:
        """Run one batched forward over streams with pending tokens; returns the labels that came with it.

        An exception from the model changes nothing: the same tokens are pending still.
        """
        self.check_engine_open()
        labels, self._undelivered = self._undelivered + self._step(), []
        return labels

    def run(self) -> list[Label]:
        """Step until nothing is pending; returns all labels. After an exception the next call returns those that
        had come before it."""
        labels = self.step()
        try:
            while self.num_pending_tokens:
                labels += self._step()
        except BaseException:
            self._undelivered = labels + self._undelivered
            raise
        return labels

    def run_until_computed(self, states: Sequence[StreamState]) -> None:
        """Step until none of these streams has pending tokens. Others advance too; their labels come with the
        next `step`."""
        while any(state.num_pending_tokens for state in states):
            self._step_for(states)

    def run_feeds(self, feeds: Sequence[Feed], policy: Policy) -> list[StreamState]:
        """Run whole streams, as many at a time as there is room for; returns their books, closed, in order.

        Raises StreamTooLong before anything runs, or Overloaded when not even one fits.
        """
        self.check_engine_open()
        for feed in feeds:
            self.check_length(len(feed.token_ids))
        done: list[StreamState] = []
        running: list[StreamState] = []
        try:
            for feed in feeds:
                while running and not self._has_room(len(feed.token_ids)):
                    # First in, first done: the oldest is waited for, the others advance in the same steps.
                    while running[0].num_pending_tokens:
                        self._step_for(running)
                    self.close_stream(running[0])
                    done.append(running.pop(0))
                running.append(self.open(feed, policy))
            self.run_until_computed(running)
        finally:
            for state in running:
                self.close_stream(state)
        return done + running

    def _step_for(self, states: Sequence[StreamState]) -> None:
        """One step whose labels of other streams are kept for the next `step`."""
        own = {state.stream_id for state in states}
        self._undelivered += [label for label in self._step() if label.stream_id not in own]

    def _step(self) -> list[Label]:
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        batch, wanted = build_batch(chunks, self.pool.block_size)
        scores = self.runner.launch(batch).wait()
        logits = scores.logits
        probs = self._readout.probabilities(logits) if scores.probs is None else scores.probs
        emitted: list[Label] = []
        for (stream, num_tokens), rows in zip(chunks, wanted, strict=True):
            labels = [
                self._readout.label(
                    stream.stream_id, role, position, stream.token_ids[position], logits[row], probs[row]
                )
                for row, (position, role) in rows
            ]
            stream.advance(num_tokens, labels)
            emitted += labels
        self._scheduler.finish(chunks)
        self.counters["steps"] += 1
        self.counters["tokens_computed"] += sum(chunk.num_tokens for chunk in chunks)
        self.counters["labels"] += len(emitted)
        return emitted

    # -- streams -------------------------------------------------------------------------------------------

    def open(self, feed: Feed, policy: Policy, stream_id: str | None = None) -> StreamState:
        """Admit a stream with its first tokens. Raises Overloaded, StreamTooLong, ConfigError or StreamClosed."""
        state = self._admit(stream_id, policy)
        self.accept(state, feed)
        self._register(state)
        self.counters["streams_opened"] += 1
        return state

    def accept(self, state: StreamState, feed: Feed) -> None:
        """Queue a feed's tokens, with KV blocks for all of them. Raises StreamTooLong or Overloaded."""
        num_tokens = state.num_tokens + len(feed.token_ids)
        self.check_length(num_tokens)
        self._grow(state, num_tokens)
        state.token_ids.extend(feed.token_ids)
        state.wanted.extend(feed.wanted)
        state.turns = feed.turns
        self._scheduler.add(state)

    def fork(self, parent: StreamState, stream_id: str | None = None) -> StreamState:
        """Branch off a stream that shares the parent's computed blocks. Raises as `open` does."""
        self.check_open(parent)
        branch = self._admit(stream_id, parent.policy, parent)
        shared = parent.block_table[: self.pool.blocks_for(parent.num_computed_tokens)]
        self.pool.share(shared)
        branch.block_table = list(shared)
        branch.num_computed_tokens = parent.num_computed_tokens
        if branch.num_pending_tokens:
            try:
                self._grow(branch, branch.num_tokens)
            except BaseException:
                self.pool.shrink(branch, 0)
                raise
            self._scheduler.add(branch)
        self._register(branch)
        self.counters["forks"] += 1
        return branch

    def rollback(self, state: StreamState, num_tokens: int) -> None:
        """Drop the last `num_tokens` tokens. Raises InvalidTokens where there are fewer or the template would break."""
        self.check_open(state)
        if isinstance(num_tokens, bool) or not isinstance(num_tokens, int | np.integer):
            raise InvalidTokens(f"rollback of {num_tokens!r} tokens: a whole number is needed")
        remaining = state.num_tokens - int(num_tokens)
        if not 0 <= remaining <= state.num_tokens:
            raise InvalidTokens(
                f"{state.stream_id}: cannot roll back {num_tokens} of {state.num_tokens} tokens"
            )
        if state.turns is not None:
            state.turns, remaining = cut_turns(state.turns, remaining)
        state.truncate(remaining)
        self.pool.shrink(state, remaining)
        self._forget_undelivered(state, remaining)
        if not state.num_pending_tokens:
            self._scheduler.discard(state)
        self.counters["rollbacks"] += 1

    def close_stream(self, state: StreamState) -> None:
        """Free a stream's blocks and its place. Closing twice is fine."""
        if state.is_closed:
            return
        self._check_own(state)
        state.is_closed = True
        self._scheduler.discard(state)
        self.pool.shrink(state, 0)
        self._forget_undelivered(state, 0)
        del self.streams[state.stream_id]

    def close(self) -> None:
        """Close every stream and refuse all further calls."""
        for state in list(self.streams.values()):
            self.close_stream(state)
        if not self._is_closed:
            self.runner.close()
        self._is_closed = True

    # -- checks --------------------------------------------------------------------------------------------

    def check_engine_open(self) -> None:
        if self._is_closed:
            raise StreamClosed("the engine has been closed; make a new one with Engine.from_pretrained")

    def check_open(self, state: StreamState) -> None:
        self.check_engine_open()
        if state.is_closed:
            raise StreamClosed(f"{state.stream_id} has been closed; open a new stream")
        self._check_own(state)

    def check_token_ids(self, token_ids: Sequence[int]) -> list[int]:
        """The ids as a list of Python ints. Raises InvalidTokens unless they are 1-D, not empty and in range."""
        if isinstance(token_ids, str | bytes | bytearray | memoryview):
            raise InvalidTokens(f"token ids are needed, not text or bytes: {token_ids[:40]!r}")
        try:
            ids: np.ndarray[Any, Any] = np.asarray(token_ids)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise InvalidTokens(f"a flat sequence of token ids is needed: {error}") from None
        if ids.ndim != 1 or not ids.size:
            raise InvalidTokens(
                f"a flat, non-empty sequence of token ids is needed, not one of shape {list(ids.shape)}"
            )
        if ids.dtype.kind not in "iu":
            raise InvalidTokens(f"token ids must be whole numbers, not {ids[0]!r} ({ids.dtype})")
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            index = int(np.flatnonzero((ids < 0) | (ids >= self._vocab_size))[0])
            raise InvalidTokens(
                f"token id {ids[index]} at index {index} is outside 0..{self._vocab_size - 1}; "
                "the ids must come from the Qwen3 tokenizer"
            )
        return ids.tolist()  # type: ignore[no-any-return]

    def check_length(self, num_tokens: int) -> None:
        """Raise StreamTooLong for a stream of `num_tokens` tokens that could never be computed."""
        limit = min(self.max_model_len, self.pool.num_blocks * self.pool.block_size)
        if num_tokens > limit:
            self.counters["refused"] += 1
            reason = (
                f"max_model_len={limit}"
                if limit == self.max_model_len
                else f"the {limit} tokens of the whole KV cache (raise kv_cache_bytes)"
            )
            raise StreamTooLong(
                f"a stream of {num_tokens} tokens exceeds {reason}; shorten the conversation or open a new stream"
            )

    def check_integrity(self) -> None:
        """Raise IntegrityError unless block tables, reference counts, free list and queue agree."""
        self.pool.check_integrity(self.streams.values())
        self._scheduler.check_integrity(self.streams.values())

    # -- internals -----------------------------------------------------------------------------------------

    def _admit(self, stream_id: str | None, policy: Policy, parent: StreamState | None = None) -> StreamState:
        """A new stream's books, not yet registered, once there is a place and a name for it."""
        self.check_engine_open()
        if stream_id is None:
            stream_id = next(name for i in self._next_id if (name := f"stream-{i}") not in self.streams)
        if not isinstance(stream_id, str) or not stream_id:
            raise ConfigError(f"stream_id={stream_id!r}: a non-empty string is needed")
        if stream_id in self.streams:
            raise ConfigError(f"stream_id={stream_id!r} is in use; choose another or close that stream")
        if len(self.streams) >= self.max_num_streams:
            self.counters["refused"] += 1
            raise Overloaded(
                f"{len(self.streams)} streams are open, max_num_streams={self.max_num_streams}; close some first"
            )
        return parent.copy(stream_id) if parent else StreamState(stream_id, policy, [(-1, policy.start())])

    def _has_room(self, num_tokens: int) -> bool:
        return (
            len(self.streams) < self.max_num_streams
            and self.pool.blocks_for(num_tokens) <= self.pool.num_free
        )

    def _register(self, state: StreamState) -> None:
        self.streams[state.stream_id] = state

    def _grow(self, state: StreamState, num_tokens: int) -> None:
        try:
            self.pool.grow(state, num_tokens, self.runner.copy_block)
        except Overloaded:
            self.counters["refused"] += 1
            raise

    def _check_own(self, state: StreamState) -> None:
        if self.streams.get(state.stream_id) is not state:
            raise ConfigError(
                f"{state.stream_id} belongs to another engine; pass it to the one that opened it"
            )

    def _forget_undelivered(self, state: StreamState, num_tokens: int) -> None:
        """Drop a stream's undelivered labels from position `num_tokens` on."""
        self._undelivered = [
            label
            for label in self._undelivered
            if label.stream_id != state.stream_id or label.position < num_tokens
        ]
