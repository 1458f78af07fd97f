"""EngineThread: the one thread that uses an engine. Takes calls, runs them, steps while there is work, and sleeps.

    take messages -> run calls, accept appends -> hand over -> one step -> hand over -> ...

Appends that find no room wait here, in order of arrival within a tenant, and what follows them on their streams waits
behind them. So does what follows a long text on its stream, until that was measured beside this thread.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from guardengine.core.engine_core import EngineCore
from guardengine.core.feeds import feed_more
from guardengine.core.isolation import step_apart
from guardengine.core.state import StreamState
from guardengine.core.text_feeding import check_nothing_held, feed_settled, hold_text, settle
from guardengine.engine.calls import Append, Call, Calls, Close, Future, Measured, Message, Missed, Result
from guardengine.engine.engine import Engine
from guardengine.errors import AuditError, ConfigError, GuardEngineError, Overloaded, StreamClosed
from guardengine.gen.answering import Answering, Job
from guardengine.gen.answers import Mode
from guardengine.gen.prompts import Prompt
from guardengine.text.chat_template import ChatTemplate

logger = logging.getLogger("guardengine")

_LEAST_NAP_S, _LONGEST_NAP_S = 0.01, 60.0
_LAST_WORDS_S = 1.0
_AUDIT_NAP_S = 0.2  # between attempts to write the audit log


class EngineThread:
    """Starts with `load` and ends after `stop` or `abort`; the engine is closed then."""

    def __init__(self, load: Callable[[], Engine], calls: Calls) -> None:
        self.engine: Engine | None = None  # None: being loaded
        self.step_began: float | None = None  # time.monotonic() at the start of the step under way
        self.error: BaseException | None = None  # that ended it
        self.has_engine = threading.Event()  # or has failed to load it
        self.calls, self._load = calls, load
        self._is_stopping = self._is_aborted = False
        self._results: list[Result] = []
        self._accepted: dict[StreamState, list[Append]] = {}  # whose labels are to come
        self._answered: dict[Job, Future] = {}  # conversations that a Gen checkpoint is to answer
        # By tenant: what waits for room, and what follows it.
        self._room: dict[str, deque[Append | Call]] = {}
        # A text that is being measured, and what follows it on its stream.
        self._unmeasured: dict[StreamState, deque[Append | Call]] = {}
        self._thread = threading.Thread(target=self._run, name="guardengine", daemon=True)
        self._thread.start()

    # -- any thread's --------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End when everything that is pending is computed."""
        self._is_stopping = True
        self.calls.wake()

    def abort(self) -> None:
        """End after the step under way."""
        self._is_aborted = True
        self.calls.wake()

    def join(self) -> None:
        """Wait until the thread, which has said that it takes no more calls, is gone. A thread that frees tensors while
        the interpreter shuts down takes the process with it."""
        self._thread.join(_LAST_WORDS_S)

    @property
    def loaded(self) -> Engine:
        """The engine. Raises ConfigError while it is being loaded."""
        if self.engine is None:
            raise ConfigError(
                "the engine is not loaded yet; use `async with` or `await` on the AsyncEngine first"
            )
        return self.engine

    @property
    def core(self) -> EngineCore:
        """Its core. Raises as `loaded`."""
        return self.loaded.core

    @property
    def chat(self) -> ChatTemplate | None:
        """Its chat template. Raises as `loaded`."""
        return self.loaded.chat

    # -- for calls that run here ---------------------------------------------------------------------------

    def is_full(self, tenant: str) -> bool:
        """Whether appends of the tenant wait for room."""
        return tenant in self._room

    def lag_s(self) -> float:
        """For how long what waits longest has waited: an append for its labels, or a conversation for its answer."""
        appends = [appends[0] for appends in self._accepted.values()]
        queues = (*self._room.values(), *self._unmeasured.values())
        appends += [first for waiting in queues if isinstance(first := waiting[0], Append)]
        began = [append.began for append in appends] + [job.began for job in self._answered]
        return time.monotonic() - min(began) if began else 0.0

    def answer(
        self, answering: Answering, prompts: Sequence[Prompt], mode: Mode, futures: Sequence[Future]
    ) -> None:
        """Resolve futures with the jobs of these prompts when they are done; one that is done already, cancelled,
        drops its own. Raises StreamTooLong, and Overloaded where too many wait."""
        answering.check_waiting(len(prompts), self.calls.max_waiting)

        def done(job: Job) -> None:
            self._results.append((self._answered.pop(job), job, job.error))

        jobs = answering.submit(prompts, mode, done)
        self._answered |= zip(jobs, futures, strict=True)
        answering.advance()

    def expect(self, append: Append) -> None:
        """Resolve an append, whose tokens are accepted, when its labels are there."""
        if append.is_computed:
            self._results.append((append.future, append.labels(), None))
        else:
            self._accepted.setdefault(append.state, []).append(append)

    def expect_turn(self, state: StreamState, turn: Future) -> None:
        """Resolve the `turn` of a stream with a history when its latest user turn is read."""
        ends = [wanted.position + 1 for wanted in state.wanted if wanted.role == "user"]
        self.expect(Append(state, turn, [], end=ends[-1] if ends else 0))

    def rollback(self, state: StreamState, num_tokens: int) -> None:
        """Drop tokens. Appends end with the labels that they keep."""
        self.core.rollback(state, num_tokens)
        for append in self._accepted.get(state, ()):
            append.end = min(append.end or 0, state.num_tokens)
        self._resolve([state])

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        reason: Exception = StreamClosed("the engine has been closed; make a new one")
        try:
            engine = self._load()
            with engine.core.gate:  # from now on no other thread gets in
                self.engine = engine
                self.has_engine.set()
            self._serve(engine)
        except BaseException as error:
            self.error = error
            if self.engine is None and isinstance(error, Exception):
                reason = error
            else:
                logger.exception("the engine's thread failed")
                reason = StreamClosed(f"the engine's thread failed ({error!r}); make a new engine")
        finally:
            self.has_engine.set()
            try:
                if self.engine is not None:
                    self.engine.close()
            except AuditError as error:
                self.error = error
                logger.error("closed with an unfinished audit log: %s", error)
            finally:
                self.calls.end(reason)

    def _serve(self, engine: Engine) -> None:
        core, calls = self.core, self.calls
        while not self._is_aborted:
            num_in_flight = len(core.pipeline)
            for message in calls.take(self._nap_s()):
                self._receive(message)
            core.sweep()
            self._retry()
            if len(core.pipeline) < num_in_flight and not core.recorder.is_failing:  # a call has landed them
                self._resolve(list(self._accepted))
            self._hand_over()
            if core.has_work and not self._is_aborted:
                self._step(engine)
                self._retry()  # before sleep: what was computed has made room
                self._hand_over()
                if core.recorder.is_failing and self._is_stopping:
                    return
            elif self._is_stopping and calls.is_quiet and not self._unmeasured:
                return

    def _step(self, engine: Engine) -> None:
        self.step_began = time.monotonic()
        try:
            with engine.core.gate:
                labels, given_up = step_apart(engine.core, engine.canary)
        except AuditError as error:
            # Tried again after a nap; until then nobody is told what is not on record.
            for appends in self._accepted.values():
                self._results += [(append.future, None, error) for append in appends]
            self._accepted.clear()
            return
        finally:
            self.step_began = None
        if engine.answering is not None:
            dropped = [job for job, future in self._answered.items() if future.done()]
            for job in dropped:
                del self._answered[job]
            engine.answering.cancel(dropped)
            engine.answering.fail(given_up)
            engine.answering.advance()
        states = engine.core.states
        names = dict.fromkeys(label.stream_id for label in labels)  # the last token of an append has a label
        self._resolve([states[name] for name in names if name in states])
        for state in given_up:
            for append in self._accepted.pop(state, ()):
                self._results.append((append.future, append.labels(), None))

    def _resolve(self, states: Iterable[StreamState]) -> None:
        """Put the labels of appends that are computed by now among the results."""
        for state in states:
            appends = self._accepted.get(state)
            if not appends:
                continue
            left = [append for append in appends if not append.is_computed]
            if len(left) == len(appends):
                continue
            self._results += [
                (append.future, append.labels(), None) for append in appends if append.is_computed
            ]
            if left:
                self._accepted[state] = left
            else:
                del self._accepted[state]

    def _hand_over(self) -> None:
        results, self._results = self._results, []
        if not self.calls.post(results):
            logger.error("the event loop was closed before its AsyncEngine; closing the engine")
            self._is_aborted = True

    def _nap_s(self) -> float | None:
        """How long to sleep at most: not while there is work, and so that idle streams are closed at about their
        time."""
        if self.core.recorder.is_failing:
            return _AUDIT_NAP_S
        if self.core.has_work or (self._is_stopping and not self._unmeasured):
            return 0
        ttl = self.core.options.idle_ttl_s
        if ttl is None or not len(self.core.residency.idle):
            return None
        return min(max(ttl / 4, _LEAST_NAP_S), _LONGEST_NAP_S)

    # -- messages ------------------------------------------------------------------------------------------

    def _receive(self, message: Message) -> None:
        match message:
            case Append(state=state) | Call(state=StreamState() as state) if state in self._unmeasured:
                self._unmeasured[state].append(message)
            case Append(is_measuring=True):
                self._unmeasured[message.state] = deque([message])
            case Append():
                waiting = self._room.get(message.state.tenant)
                if waiting:
                    waiting.append(message)
                elif not self._accept(message):
                    self._room[message.state.tenant] = deque([message])
            case Call(state=state):
                waiting = None if state is None else self._room.get(state.tenant)
                if waiting and any(other.state is state for other in waiting):
                    waiting.append(message)
                else:
                    self._call(message)
            case Close():
                self._close(message)
            case Measured():
                self._measured(message.append)
            case Missed():
                self._record(message.append)

    def _measured(self, append: Append) -> None:
        """Go on with a text that was measured, where it is its turn, and with what waits behind it."""
        append.is_measuring = False
        waiting = self._unmeasured.get(append.state)
        if waiting and waiting[0] is append:
            del self._unmeasured[append.state]
            for message in waiting:
                self._receive(message)

    def _retry(self) -> None:
        """Accept what waits for room, as far as there is some by now."""
        for tenant, waiting in list(self._room.items()):
            while waiting:
                first = waiting[0]
                if isinstance(first, Append):
                    if not self._accept(first):
                        break
                else:
                    self._call(first)
                waiting.popleft()
            if not waiting:
                del self._room[tenant]

    def _accept(self, append: Append) -> bool:
        """Feed an append's tokens; False: there is no room for them now."""
        if not self.calls.claim(append):
            self._keep(append)
            return True  # it was withdrawn
        core, state = self.core, append.state
        start, num_refused = state.num_tokens, core.counters["refused"]
        try:
            self._feed(append)
        except Overloaded:
            if append.is_refused:
                core.counters["refused"] = num_refused  # counts once
            append.is_refused = True
            if append.failure is not None:  # its deadline came while nobody had time for it
                append.failure = "overload"
            self.calls.unaccepted.add(append)
            # Cancelled or expired meanwhile: its owner may have tried to claim it just now, in vain.
            if append.future.done() and self.calls.claim(append):
                self._keep(append)
                return True
            return False
        except Exception as error:
            self._results.append((append.future, None, error))
        else:
            # Without tokens there is nothing to wait for, those before it included.
            append.start, append.end = start, state.num_tokens if state.num_tokens > start else 0
            self.expect(append)
        return True

    def _feed(self, append: Append) -> None:
        """Feed tokens, or what text comes to: that is found once, because nothing else happens to the stream while
        its first append waits for room."""
        core, state = self.core, append.state
        core.check_open(state)
        if append.too_long is not None:
            raise append.too_long
        if append.piece is None:
            check_nothing_held(state)
            core.accept(state, feed_more(self.chat, state, append.token_ids, append.role))
            return
        if append.settled is None:
            append.settled = settle(core, self.chat, state, append.piece)
        feed_settled(core, self.chat, state, append.settled)

    def _keep(self, append: Append) -> None:
        """Hold the text of an append that was withdrawn, in its turn: a reply has no holes."""
        if append.piece is not None and not append.state.is_closed:
            with contextlib.suppress(GuardEngineError):  # what cannot be fed at all; nobody waits to be told
                hold_text(self.core, self.chat, append.state, append.piece)

    def _call(self, call: Call) -> None:
        if call.is_skippable and call.future is not None and call.future.done():
            return
        value, error = None, None
        try:
            value = call.run()
        except Exception as raised:
            error = raised
        if call.future is not None:
            self._results.append((call.future, value, error))

    def _close(self, close: Close) -> None:
        state = close.state
        self.core.close_stream(state)
        waiting = self._room.pop(state.tenant, deque())
        left = deque(call for call in waiting if call.state is not state)
        if left:
            self._room[state.tenant] = left
        dropped: list[Append | Call] = [call for call in waiting if call.state is state]
        dropped += self._unmeasured.pop(state, ())
        for call in dropped + self._accepted.pop(state, []):
            if isinstance(call, Append):
                self.calls.claim(call)
            if call.future is not None:
                reason = StreamClosed(f"{state.stream_id} was closed before this call was done")
                self._results.append((call.future, None, reason))
        if close.future is not None:
            self._results.append((close.future, None, None))

    def _record(self, append: Append) -> None:
        if append.failure is not None and not append.state.is_closed:
            self.core.fail(append.state, append.failure)
        append.is_recorded = True
