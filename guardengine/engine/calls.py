"""Calls: the way from one event loop to the thread that has the engine, and back.

    loop    call(...), append(...)     what one turn of the loop asks for goes over together
    thread  take(), post(results)      one callback in the loop for all results of a step

An append is in `unaccepted` until the core has taken its tokens. Whoever claims it, removes it from there: the thread
to feed it, the loop to withdraw it. Knows no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from guardengine.core.state import StreamState
from guardengine.errors import Overloaded, StreamClosed, StreamTooLong, WrongLoop
from guardengine.labels import Label, Role
from guardengine.policy import Failure
from guardengine.text.spans import Piece, TokenizedPiece

Future = asyncio.Future[Any]


@dataclass(slots=True, eq=False)
class Append:
    """Tokens, or text, on their way to their labels: those of one append, or those that a stream was opened with."""

    state: StreamState
    future: Future
    unrecorded: list[Append]  # of its stream: those whose failure the core does not know yet
    token_ids: list[int] = field(default_factory=list)
    role: Role = "assistant"
    piece: Piece | None = None  # text, instead of token_ids
    settled: TokenizedPiece | None = None  # what it comes to, once it was this append's turn
    is_measuring: bool = False  # its text is long: the thread waits for `Measured`
    too_long: StreamTooLong | None = None  # what that came to
    start: int = 0
    end: int | None = None  # None: not accepted
    is_refused: bool = False  # for lack of room, so far
    failure: Failure | None = None  # what its deadline came to
    is_recorded: bool = False  # the core knows of the failure
    began: float = field(default_factory=time.monotonic)

    @property
    def is_computed(self) -> bool:
        return self.end is not None and self.state.num_seen_tokens >= self.end

    def labels(self) -> list[Label]:
        """Those there are. For the thread."""
        return [] if self.end is None else self.state.labels_between(self.start, self.end)

    def labels_by_now(self) -> list[Label]:
        """Those there are, for the event loop: the thread may be changing the lists, so they are copied first."""
        if (end := self.end) is None:
            return []
        labels = self.state.labels if self.role == "assistant" else self.state.prompt_labels
        return [label for label in labels[:] if self.start <= label.position < end]


class Call(NamedTuple):
    """Something to run. One with a `state` runs after that stream's appends so far were accepted."""

    run: Callable[[], Any]
    future: Future | None = None
    state: StreamState | None = None
    is_skippable: bool = False  # not worth running when nobody waits for it any more


class Close(NamedTuple):
    """A stream to close, whatever it is waiting for."""

    state: StreamState
    future: Future | None = None


class Missed(NamedTuple):
    """An append whose deadline has come."""

    append: Append


class Measured(NamedTuple):
    """An append whose long text was measured beside the thread."""

    append: Append


Message = Append | Call | Close | Measured | Missed
Result = tuple[Future, Any, BaseException | None]


class Calls:
    """What is under way between one event loop and the engine's thread."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.unaccepted: set[Append] = set()
        self.reason: Exception | None = None  # why no calls are taken any more
        self.ended = asyncio.Event()  # the thread is gone
        self._loop: asyncio.AbstractEventLoop | None = None
        self._futures: set[Future] = set()
        self._outbox: list[Message] = []
        self._queue: SimpleQueue[list[Message]] = SimpleQueue()

    # -- the event loop's side -----------------------------------------------------------------------------

    def bind(self) -> asyncio.AbstractEventLoop:
        """The running loop, which is the only one from now on. Raises WrongLoop for another one."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif loop is not self._loop:
            raise WrongLoop(
                "the AsyncEngine belongs to the event loop that used it first, and this is another one; make one "
                "AsyncEngine for each loop"
            )
        return loop

    def new_future(self) -> Future:
        """A future that fails when calls are refused. Raises WrongLoop, or why no calls are taken."""
        loop = self.bind()
        future = loop.create_future()
        self._futures.add(future)
        if self.reason is not None:  # read after the loop is known and the future is on the list
            self._futures.discard(future)
            raise _again(self.reason)
        return future

    async def call(
        self, run: Callable[[], Any], state: StreamState | None = None, *, is_skippable: bool = False
    ) -> Any:
        """Run something on the thread. When this is cancelled it may run all the same."""
        future = self.new_future()
        self.send(Call(run, future, state, is_skippable))
        return await self._result(future)

    async def close_stream(self, state: StreamState) -> None:
        """Close a stream. It is closed when this is cancelled, too."""
        future = self.new_future()
        self.send(Close(state, future))
        await self._result(future)

    async def append(self, append: Append, timeout_s: float | None) -> list[Label]:
        """Feed tokens and wait for their labels. See AsyncStream.append."""
        self.unaccepted.add(append)
        self.send(append)
        timer = None if timeout_s is None else self.bind().call_later(timeout_s, self.expire, append)
        try:
            labels: list[Label] = await self._result(append.future)
            return labels
        except asyncio.CancelledError:
            if self.claim(append):
                self.send(Call(_nothing))  # those behind it may have room now
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def check_waiting(self) -> None:
        """Raise Overloaded when too many appends wait to be accepted."""
        if len(self.unaccepted) >= self.max_waiting:
            raise Overloaded(
                f"{len(self.unaccepted)} appends wait to be accepted, max_waiting={self.max_waiting}; retry when some "
                "are done, or append more tokens at a time"
            )

    def expire(self, append: Append) -> None:
        """The deadline of an append has come. Tokens that wait for room are withdrawn; others are computed still."""
        if append.future.done() or append.is_computed:  # its labels are on their way
            return
        append.failure = "overload" if append.is_refused and self.claim(append) else "timeout"
        unrecorded = append.unrecorded
        append.unrecorded = []  # a list that it is in itself would keep both for the garbage collector
        unrecorded[:] = [other for other in unrecorded if not other.is_recorded]
        unrecorded.append(append)
        append.future.set_result(append.labels_by_now())
        self.send(Missed(append))

    def send(self, message: Message) -> None:
        """Send a message with the others of this turn of the loop."""
        if not self._outbox:
            self.bind().call_soon(self.flush)
        self._outbox.append(message)

    def flush(self) -> None:
        """Send what waits to be sent."""
        if self._outbox:
            messages, self._outbox = self._outbox, []
            self._queue.put(messages)

    def refuse(self, reason: Exception, *, also_waiting: bool) -> None:
        """Take no more calls; end those that wait as well, or leave them to the thread."""
        self.reason = self.reason or reason
        if also_waiting:
            for future in self._futures:
                if not future.done():
                    _fail(future, _again(self.reason))
            self._futures.clear()
            self.unaccepted.clear()

    def forget(self, future: Future) -> None:
        """A future from `new_future` that will not be used."""
        self._futures.discard(future)

    async def _result(self, future: Future) -> Any:
        try:
            return await future
        finally:
            self._futures.discard(future)

    def _end(self, reason: Exception) -> None:
        self.refuse(reason, also_waiting=True)
        self.ended.set()

    def _deliver(self, results: list[Result]) -> None:
        for future, value, error in results:
            self._futures.discard(future)
            if future.done():  # nobody waits any more; a stream among the values closes itself
                continue
            if error is None:
                future.set_result(value)
            else:
                _fail(future, error)

    # -- any thread's --------------------------------------------------------------------------------------

    def claim(self, append: Append) -> bool:
        """Take an append that was not accepted yet; False when it is somebody else's already."""
        try:
            self.unaccepted.remove(append)
        except KeyError:
            return False
        return True

    def abandon(self, state: StreamState) -> None:
        """Close a stream that nobody holds any more. For the garbage collector, in the middle of any call."""
        self._queue.put([Close(state)])  # reentrant

    def wake(self) -> None:
        """Make `take` return."""
        self._queue.put([])

    # -- the thread's side ---------------------------------------------------------------------------------

    def take(self, timeout_s: float | None) -> list[Message]:
        """All messages that have come; waits for the first, at most `timeout_s` seconds."""
        messages: list[Message] = []
        with contextlib.suppress(Empty):
            messages += self._queue.get_nowait() if timeout_s == 0 else self._queue.get(timeout=timeout_s)
            while True:
                messages += self._queue.get_nowait()
        return messages

    @property
    def is_quiet(self) -> bool:
        """No messages are waiting."""
        return self._queue.empty()

    def post(self, results: list[Result]) -> bool:
        """Hand results over; False when the loop has been closed."""
        return not results or self._call_soon(self._deliver, results)

    def end(self, reason: Exception) -> None:
        """The thread takes no more calls."""
        self.reason = self.reason or reason  # before the loop is looked at: see `new_future`
        if self._loop is None:
            self.ended.set()
        self._call_soon(self._end, reason)

    def _call_soon(self, callback: Callable[..., None], *args: Any) -> bool:
        if self._loop is None:
            return True  # nothing has been asked yet
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop is closed
            return False
        return True


def _nothing() -> None:
    """What a message runs that is only there to wake the thread."""


def _fail(future: Future, error: BaseException) -> None:
    future.set_exception(error)
    future.exception()  # counts as seen: nobody need be waiting for what a stream was opened with


def _again(error: Exception) -> Exception:
    """An error to raise once more, without the tracebacks of the other times."""
    return StreamClosed(*error.args) if type(error) is StreamClosed else error
