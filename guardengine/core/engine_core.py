"""EngineCore: the runtime over token ids. Accepts and drops tokens, and steps all streams in one batch.

`step()` is the whole story. Everything else changes one stream's books, and checks before it changes anything.
Knows no text, no files and no devices; single-threaded.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence

from guardengine.checkpoint.fingerprint import Fingerprint
from guardengine.checkpoint.model_config import ModelConfig
from guardengine.config import EngineConfig
from guardengine.core.admission import Admission, Ticket, check_timeout
from guardengine.core.block_pool import BlockPool
from guardengine.core.deadlines import Deadlines
from guardengine.core.feeds import Feed, cut
from guardengine.core.gate import Gate
from guardengine.core.pipeline import Finished, Pipeline
from guardengine.core.prefix_cache import salt_digest
from guardengine.core.readout import Readout
from guardengine.core.recorder import Recorder
from guardengine.core.residency import Residency
from guardengine.core.scheduler import Scheduler
from guardengine.core.state import StreamState
from guardengine.core.token_ids import check_token_ids
from guardengine.core.undelivered import Undelivered
from guardengine.errors import AuditError, ConfigError, Overloaded, StreamClosed, StreamTooLong
from guardengine.labels import Label
from guardengine.policy import Failure
from guardengine.runners.runner import Runner

_COUNTERS = (
    *("steps", "tokens_computed", "tokens_recomputed", "labels"),
    *("streams_opened", "streams_restored", "forks", "rollbacks", "refused", "expired"),
)


class EngineCore:
    """Streams, their KV blocks and the queue of pending tokens around one Runner."""

    def __init__(
        self,
        config: ModelConfig,
        runner: Runner,
        readout: Readout,
        pool: BlockPool,
        options: EngineConfig,
        max_model_len: int,
        fingerprint: Fingerprint,
        clock: Callable[[], float] = time.monotonic,
        recorder: Recorder | None = None,
    ) -> None:
        self.runner, self.pool, self.options, self.clock = runner, pool, options, clock
        self.max_model_len, self.fingerprint, self.readout = max_model_len, fingerprint, readout
        self.recorder = Recorder() if recorder is None else recorder
        self.states: dict[str, StreamState] = {}
        self.counters = dict.fromkeys(_COUNTERS, 0)
        self.failures: dict[str, int] = {}  # "timeout-closed": streams that failed so, by kind and policy
        self.admission = Admission(options)
        self.gate = Gate()
        reserve = int(options.kv_reserve * pool.num_blocks)
        self.residency = Residency(pool, reserve, lambda *blocks: runner.copy_block(*blocks))
        self.vocab_size = config.vocab_size
        self.scheduler = Scheduler(options.max_num_batched_tokens)
        self.pipeline = Pipeline(runner, readout, self.scheduler, pool.block_size, options.max_step_ms, clock)
        self._deadlines = Deadlines()
        self.undelivered = Undelivered()
        self._abandoned: deque[StreamState] = deque()  # to be closed, found by the garbage collector
        self._is_closed = False

    # -- the step ------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to deliver."""
        return bool(len(self.undelivered) or self.residency.hits or len(self.scheduler))

    def step(self) -> list[Label]:
        """Run one batched forward over streams with pending tokens.

        On a device that works by itself the next batch is launched before this one's labels are read.

        Returns:
            The labels that came with it, and those of earlier steps that were not returned yet.

        Raises:
            StreamClosed: the engine has been closed.
            AuditError: the audit log cannot be written; the labels come with the first step after it can.
            Exception: what the model raised. Nothing has changed: the same tokens are pending still.
        """
        self.check_engine_open()
        self.sweep()  # may finish steps and drop labels, so before undelivered ones are taken
        labels = self.undelivered.pop_all()
        try:
            self.recorder.flush()  # before the model runs: should it take the process down, what it did is on record
            self.pipeline.launch_waiting()  # scheduler -> layout -> runner
            labels += self._record(self.pipeline.finish_oldest())  # runner -> readout -> books, blocks, queue
            self.recorder.flush()  # and before anybody sees the labels
        except BaseException:
            self.undelivered.put_back(labels)
            raise
        return labels

    def run(self) -> list[Label]:
        """Step until nothing is pending; returns all labels. After an exception the next call returns those that
        had come before it."""
        labels = self.step()
        try:
            while self.has_work:
                labels += self.step()
        except BaseException:
            self.undelivered.put_back(labels)
            raise
        return labels

    def run_until_computed(self, states: Sequence[StreamState]) -> None:
        """Step until none of these streams has pending tokens. Others advance too; their labels come with the
        next `step`."""
        while any(state.num_pending_tokens for state in states):
            self.step_for(states)
        self.undelivered.drop_all_of(states)

    def step_for(self, states: Sequence[StreamState]) -> None:
        """One step whose labels of other streams are kept for the next `step`."""
        self.undelivered.add(self.step())
        self.undelivered.drop_all_of(states)

    def _record(self, finished: list[Finished]) -> list[Label]:
        """Count tokens as computed, those of prefix hits included, and return the labels that came with them."""
        now = self.clock()
        while missed := self._deadlines.pop_missed(now):  # first: these labels came too late for it
            self.fail(missed, "timeout")
        emitted: list[Label] = []
        hits = self.residency.pop_hits()
        for index, (state, num_tokens, labels) in enumerate((*hits, *finished)):
            num_computed = state.num_computed_tokens
            if index >= len(hits) and state.num_seen_tokens > num_computed:
                again = min(num_tokens, state.num_seen_tokens - num_computed)
                self.counters["tokens_recomputed"] += again
            state.advance(num_tokens, labels)
            self.residency.publish(state, num_computed)
            self._update_queues(state, now)
            emitted += labels
        self.counters["steps"] += bool(finished)
        self.counters["tokens_computed"] += sum(chunk.num_tokens for chunk in finished)
        self.counters["labels"] += len(emitted)
        self.recorder.computed(emitted, self.states)
        return emitted

    def land(self) -> None:
        """Finish steps in flight, so that books and blocks may be changed; their labels come with the next `step`.

        A failure is left to the next `step`, which runs the same tokens again. Raises AuditError.
        """
        if not len(self.pipeline):
            return
        while len(self.pipeline):
            with contextlib.suppress(Exception):
                self.undelivered.add(self._record(self.pipeline.finish_oldest()))
        self.recorder.flush()

    # -- streams -------------------------------------------------------------------------------------------

    def open(self, feed: Feed, ticket: Ticket, timeout_s: float | None = None) -> StreamState:
        """Admit a stream with its first tokens. Raises Overloaded, StreamTooLong, ConfigError or StreamClosed."""
        self.sweep()
        state = StreamState(
            self._admit(ticket),
            ticket.policy,
            [(-1, ticket.policy.start())],
            tenant=ticket.tenant,
            priority=ticket.priority,
            salt=salt_digest(ticket.tenant if ticket.cache_salt is None else ticket.cache_salt),
        )
        self.accept(state, feed, timeout_s, is_new=True)
        self.counters["streams_opened"] += 1
        return state

    def accept(
        self, state: StreamState, feed: Feed, timeout_s: float | None = None, *, is_new: bool = False
    ) -> None:
        """Queue a feed's tokens, with KV blocks for all of them.

        Args:
            state: the books of an open stream, or of one that is to be opened with these tokens (`is_new`).
            feed: tokens, and the labels wanted at them.
            timeout_s: tokens that are not computed within so many seconds count as unjudged (Policy.on_timeout); they
                are computed all the same.

        Raises:
            StreamTooLong, Overloaded, ConfigError, AuditError: nothing has changed.
        """
        self.recorder.check_writable()
        deadline = None if timeout_s is None else self.clock() + check_timeout(timeout_s)
        num_tokens, num_wanted = state.num_tokens, len(state.wanted)
        self.check_length(num_tokens + len(feed.token_ids), is_new=is_new)
        state.token_ids.extend(feed.token_ids)
        state.wanted.extend(feed.wanted)
        was_idle = state in self.residency.idle
        self.residency.idle.discard(state)
        try:
            # Not what is to be computed again: losing its blocks must not lock a stream out.
            self.admission.check_pending(state.tenant, len(feed.token_ids))
            self.residency.allocate(state, is_new=is_new)
        except BaseException as error:
            del state.token_ids[num_tokens:], state.wanted[num_wanted:]
            del state.block_digests[num_tokens // self.pool.block_size :]
            if was_idle:
                self.residency.idle.add(state, self.clock())
            self.counters["refused"] += isinstance(error, Overloaded | StreamTooLong)
            raise
        state.turns = feed.turns
        if is_new:
            self.states[state.stream_id] = state
            self.admission.enter(state)
        if deadline is not None:
            self._deadlines.add(state, num_tokens, state.num_tokens, deadline)
        self._update_queues(state, self.clock())
        if is_new:
            self.recorder.opened(state, feed.wanted)
        else:
            self.recorder.appended(state, num_tokens, feed.wanted)

    def fork(self, parent: StreamState, stream_id: str | None = None) -> StreamState:
        """Branch off a stream that shares the parent's computed blocks. Raises as `open` does."""
        self.recorder.check_writable()
        self.check_open(parent)
        self.land()
        ticket = Ticket(parent.policy, stream_id, parent.tenant, None, parent.priority)
        branch = parent.copy(self._admit(ticket))
        self.residency.share(branch, parent)
        self._enter(branch)
        self._deadlines.inherit(branch, parent)
        self.counters["forks"] += 1
        self.recorder.forked(branch, parent)
        return branch

    def restore(self, state: StreamState, ticket: Ticket, undelivered: list[Label]) -> None:
        """Admit a stream that another engine had, with nothing of it in the cache. Raises as `open` does.

        The `undelivered` ones of its labels come with the next `step`.
        """
        self.recorder.check_writable()
        self.sweep()
        state.stream_id = self._admit(ticket)
        self.check_length(state.num_tokens, is_new=True)
        self._enter(state)
        self.undelivered.add(undelivered)
        self.counters["streams_restored"] += 1
        self.recorder.restored(state, len(undelivered))

    def rollback(self, state: StreamState, num_tokens: int) -> None:
        """Drop the last `num_tokens` tokens. Raises InvalidTokens where there are fewer or the template would break."""
        self.recorder.check_writable()
        self.check_open(state)
        turns, remaining = cut(state, num_tokens)
        self.land()
        state.turns = turns
        state.truncate(remaining, self.pool.block_size)
        self.residency.cut(state, remaining)
        self.undelivered.drop(state, remaining)
        self._deadlines.drop(state, remaining)
        self._update_queues(state, self.clock())
        self.counters["rollbacks"] += 1
        self.recorder.rolled_back(state)

    def close_stream(self, state: StreamState) -> None:
        """Free a stream's blocks and its place. Closing twice is fine."""
        if state.is_closed:
            return
        self._check_own(state)
        if len(self.pipeline):
            # Closing frees memory and must work; what has landed is in the recorder's hands.
            with contextlib.suppress(AuditError):
                self.land()
        state.is_closed = True
        self.scheduler.discard(state)
        self.residency.leave(state)
        self.undelivered.drop(state)
        self.admission.leave(state)
        del self.states[state.stream_id]
        self.recorder.closed(state)

    def abandon(self, state: StreamState) -> None:
        """Close a stream with the next `step` or `open`. May be called from any thread, in the middle of any call."""
        self._abandoned.append(state)

    def fail(self, state: StreamState, failure: Failure) -> None:
        """Record that tokens of a stream went unjudged; counted by kind and by what its policy makes of it."""
        state.fail(failure)
        name = f"{failure}-{getattr(state.policy, f'on_{failure}')}"
        self.failures[name] = self.failures.get(name, 0) + 1
        if self.states.get(state.stream_id) is state:
            self.recorder.failed(state, failure)

    def close(self) -> None:
        """Close every stream and refuse all further calls. Raises AuditError, and may then be called again."""
        for state in list(self.states.values()):
            self.close_stream(state)
        if not self._is_closed:
            self.runner.close()
        self._is_closed = True
        self.recorder.close()

    def sweep(self) -> None:
        """Close streams that nobody holds any more or that were idle for longer than idle_ttl_s."""
        while self._abandoned:
            self.close_stream(self._abandoned.popleft())
        ttl = self.options.idle_ttl_s
        while ttl is not None and (state := self.residency.idle.longest(before=self.clock() - ttl)):
            self.close_stream(state)
            self.counters["expired"] += 1

    # -- checks --------------------------------------------------------------------------------------------

    def check_engine_open(self) -> None:
        if self._is_closed:
            raise StreamClosed("the engine has been closed; make a new one with Engine.from_pretrained")

    def check_open(self, state: StreamState) -> None:
        self.check_engine_open()
        if state.is_closed:
            raise StreamClosed(
                f"{state.stream_id} has been closed, by a call or for being idle longer than idle_ttl_s; open a new "
                "stream"
            )
        self._check_own(state)

    def check_token_ids(self, token_ids: Sequence[int]) -> list[int]:
        """The ids as a list of Python ints. Raises InvalidTokens unless they are 1-D, not empty and in range."""
        return check_token_ids(token_ids, self.vocab_size)

    def check_length(self, num_tokens: int, *, is_new: bool = False) -> None:
        """Raise StreamTooLong for a stream of `num_tokens` tokens that could never be computed."""
        try:
            self.residency.check_length(num_tokens, self.max_model_len, is_new=is_new)
        except StreamTooLong:
            self.counters["refused"] += 1
            raise

    def check_integrity(self) -> None:
        """Raise IntegrityError unless block tables, reference counts, free list and queue agree."""
        for books in (self.pool, self.scheduler, self.admission, self.residency.idle):
            books.check_integrity(self.states.values())

    # -- internals -----------------------------------------------------------------------------------------

    def _admit(self, ticket: Ticket) -> str:
        """The name of a stream that may be opened. Raises StreamClosed, ConfigError or Overloaded."""
        self.check_engine_open()
        try:
            return self.admission.admit(ticket)
        except Overloaded:
            self.counters["refused"] += 1
            raise

    def _enter(self, state: StreamState) -> None:
        """Let a stream with a history in, with blocks for what is pending. Raises Overloaded."""
        try:
            self.admission.check_pending(state.tenant, state.num_tokens - state.num_seen_tokens)
            if state.num_pending_tokens:
                self.residency.allocate(state, is_new=True)
        except BaseException as error:
            self.residency.leave(state)
            self.counters["refused"] += isinstance(error, Overloaded)
            raise
        self.states[state.stream_id] = state
        self.admission.enter(state)
        self._update_queues(state, self.clock())

    def _update_queues(self, state: StreamState, now: float) -> None:
        """Put a stream where it belongs by now: into the queue or among the idle ones."""
        self.admission.update(state)
        self.scheduler.update(state)
        if state.is_idle:
            self.residency.idle.add(state, now)
        else:
            self.residency.idle.discard(state)

    def _check_own(self, state: StreamState) -> None:
        if self.states.get(state.stream_id) is not state:
            raise ConfigError(
                f"{state.stream_id} belongs to another engine; pass it to the one that opened it"
            )
