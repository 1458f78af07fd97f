"""AsyncEngine: the engine for asyncio. Every call is a message to the one thread that has the engine; see `calls`."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from guardengine import checks
from guardengine.core.admission import Ticket, check_timeout
from guardengine.core.feeds import Feed
from guardengine.core.state import StreamState
from guardengine.core.whole_streams import moderation, open_feed
from guardengine.engine.async_stream import AsyncStream
from guardengine.engine.calls import Append, Call, Calls, Future
from guardengine.engine.conversations import Options, Prepared, Whole, check_lengths, fit, in_place
from guardengine.engine.engine import Engine
from guardengine.engine.engine_thread import EngineThread
from guardengine.engine.info import EngineInfo
from guardengine.engine.moderator import OnUnfit
from guardengine.engine.opening import Messages, Opening
from guardengine.engine.unanswered import report_unanswered
from guardengine.errors import Overloaded, StreamClosed
from guardengine.gen.answering import Answering, Job
from guardengine.gen.answers import Mode
from guardengine.gen.prompts import Prompt
from guardengine.labels import GenModeration, Moderation, Role
from guardengine.policy import Policy

MAX_WAITING = 4096


class AsyncEngine:
    """Moderates many conversations at once, for many tasks of one event loop.

        async with AsyncEngine.from_pretrained(path) as engine:
            async with await engine.open(messages=[...]) as stream:
                label = await stream.prompt()
                labels = await stream.append([8420, 525])

    One thread has the engine: it runs steps while tokens are pending and sleeps otherwise. `AsyncEngine(engine)` takes
    an engine over, from the thread that owns it; its own methods raise WrongThread from then on, and it is closed with
    the AsyncEngine.

    max_waiting: how many appends may wait to be accepted, for room or for the step under way.

    Any call may be cancelled at any time and disturbs no other. Every call raises WrongLoop from another event loop
    than the first, and StreamClosed once the engine has been closed.
    """

    def __init__(self, engine: Engine | Callable[[], Engine], *, max_waiting: int = MAX_WAITING) -> None:
        """Take over an engine, or start to load one.

        Args:
            engine: The engine, or a function that makes it, which is called in the engine's thread.
            max_waiting: Number of appends that may wait to be accepted, from 1.
        """
        checks.whole_number("max_waiting", max_waiting, 1)
        if isinstance(engine, Engine):
            engine.core.check_engine_open()
            engine.core.gate.hand_over()
        self.calls = Calls(max_waiting)
        self.thread = EngineThread((lambda: engine) if isinstance(engine, Engine) else engine, self.calls)
        self._health: Future | None = None
        weakref.finalize(self, self.thread.abort).atexit = False
        if isinstance(engine, Engine):
            self.thread.has_engine.wait()

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | Path, *, max_waiting: int = MAX_WAITING, **options: Any
    ) -> AsyncEngine:
        """Load a checkpoint in the engine's thread; the event loop goes on.

        Use it as `async with AsyncEngine.from_pretrained(...) as engine` or `engine = await
        AsyncEngine.from_pretrained(...)`: both wait until it is loaded, and raise CheckpointError or ConfigError.

        Args:
            path_or_id: A folder or a hub id.
            max_waiting: Number of appends that may wait to be accepted, from 1.
            **options: The other options of `Engine.from_pretrained`.
        """
        return cls(lambda: Engine.from_pretrained(path_or_id, **options), max_waiting=max_waiting)

    async def _loaded(self) -> AsyncEngine:
        await self.calls.call(bool)
        return self

    def __await__(self) -> Generator[Any, None, AsyncEngine]:
        return self._loaded().__await__()

    async def __aenter__(self) -> AsyncEngine:
        return await self._loaded()

    async def __aexit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        await self.close(drain=kind is None)

    # -- streams -------------------------------------------------------------------------------------------

    async def open(
        self,
        messages: Messages | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        role: Role = "user",
        policy: Policy | None = None,
        stream_id: str | None = None,
        tenant: str = "",
        cache_salt: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> AsyncStream:
        """Open a stream. Returns before anything is computed: see `AsyncStream.prompt`.

        Long messages are rendered beside the engine's thread, while other streams go on.

        Args:
            messages: As in `Engine.open`, which says more of each.
            token_ids: Qwen3 ids instead of messages.
            role: Of token_ids: "user" or "assistant".
            policy: Policy.strict() by default.
            stream_id: The name in labels and logs.
            tenant: Whom the limits for each tenant count.
            cache_salt: Streams of one salt (by default the tenant) share cached KV blocks.
            priority: From -3 to 3; a stream of higher priority runs sooner.
            timeout_s: Seconds from this call. What the stream is opened with and is not computed by then counts as
                unjudged (Policy.on_timeout); it is computed all the same.

        Returns:
            The stream's handle.

        Raises:
            InvalidText, InvalidTokens, StreamTooLong, ConfigError, StreamClosed: As in `Engine.open`.
            Overloaded: At once, where there is no room, or none beside the tenant's appends that wait for it.
        """
        deadline = None if timeout_s is None else time.monotonic() + check_timeout(timeout_s)
        # The deadline is kept here: the thread's would begin when it comes round to this.
        opening = Opening(messages, token_ids, role, policy, stream_id, tenant, cache_salt, priority, None)
        turn, unrecorded = self.calls.new_future(), list[Append]()

        def run(feed: Feed | None) -> tuple[AsyncStream, Append]:
            self._check_not_full(tenant)
            return self._opened(self.engine.open_state(opening, feed), turn, unrecorded)

        try:
            feed = None
            if opening.is_long:
                feed = await asyncio.to_thread((await self._loaded()).engine.prepare_opening, opening)
            stream, append = await self.calls.call(lambda: run(feed), is_skippable=True)
        except BaseException:
            self.calls.forget(turn)
            raise
        if deadline is not None:
            self._expire_in(deadline - time.monotonic(), append)
        return stream  # type: ignore[no-any-return]

    async def restore(self, snapshot: Mapping[str, Any], stream_id: str | None = None) -> AsyncStream:
        """Go on with a stream of which a snapshot was taken. Labels that were pending are computed at once and come
        into `labels`; so do those that no `step` had returned.

        Args:
            snapshot: What `snapshot` of a Stream or AsyncStream returned.
            stream_id: Another name than the snapshot's.

        Raises:
            GuardEngineError: As `Engine.restore`.
        """
        engine, turn = (await self._loaded()).engine, self.calls.new_future()

        def run() -> AsyncStream:
            state = engine.restore(snapshot, stream_id)._state
            self.thread.expect_turn(state, turn)
            return AsyncStream(self, self.thread, state, turn, [])

        try:
            await asyncio.to_thread(engine.core.fingerprint.weights)  # reads whole files, once
            return await self.calls.call(run, is_skippable=True)  # type: ignore[no-any-return]
        except BaseException:
            self.calls.forget(turn)
            raise

    # -- whole conversations -------------------------------------------------------------------------------

    async def moderate(
        self, messages: Messages, policy: Policy | None = None, *, mode: Mode | None = None
    ) -> Moderation | GenModeration:
        """Moderate one finished conversation. See `moderate_many`.

        Args:
            messages: As in `open`.
            policy: Policy.strict() by default.
            mode: Gen checkpoints only: "choice" (the default) or "greedy".
        """
        answer: Moderation | GenModeration
        [answer] = await self.moderate_many([messages], policy, mode=mode)
        return answer

    async def moderate_many(
        self,
        conversations: Sequence[Messages],
        policy: Policy | None = None,
        *,
        mode: Mode | None = None,
        tenant: str = "",
        timeout_s: float | None = None,
        spans: bool = False,
        on_unfit: OnUnfit = "raise",
    ) -> list[Any]:
        """Moderate finished conversations beside the open streams, as `Engine.moderate_many` does.

        They are rendered beside the engine's thread. Where the model failed on a conversation, or `timeout_s` has
        passed, its labels are incomplete and `response` is the policy's verdict on that, conversations that end with
        the user included; a Gen checkpoint's answer is "Unparsable" then.

        Args:
            conversations: Messages of each, as in `open`.
            policy: Policy.strict() by default.
            mode: Gen checkpoints only: "choice" (the default) or "greedy".
            tenant: As in `open`. Stream checkpoints only, as the two that follow.
            timeout_s: Seconds for each conversation, from when there is room for it.
            spans: Whether to say where the token of each label stands.
            on_unfit: "raise" the error of an unfit conversation, or "return" it in its place.

        Returns:
            A list as of `Engine.moderate_many`, in order.

        Raises:
            Overloaded: There is no room for even one, or `max_waiting` conversations wait for a Gen checkpoint.
            GuardEngineError: For the rest, as `Engine.moderate_many`.
        """
        await self._loaded()
        engine, options = self.engine, Options(mode, tenant, timeout_s, spans, on_unfit)
        prepared = await asyncio.to_thread(engine.conversations.prepare, conversations, policy, options)
        items = await self.calls.call(
            lambda: check_lengths(engine.core, engine.answering, prepared, on_unfit)
        )
        if engine.answering is not None:
            return in_place(items, await self._answer(engine.answering, fit(items), prepared))
        return in_place(
            items, await self._judge(fit(items), Ticket(prepared.policy, tenant=tenant), timeout_s)
        )

    async def _judge(
        self, conversations: Sequence[Whole], ticket: Ticket, timeout_s: float | None
    ) -> list[Moderation]:
        turns = [self.calls.new_future() for _ in conversations]
        to_do = deque(zip(range(len(turns)), conversations, turns, strict=True))
        done: dict[int, Moderation] = {}
        running: dict[Future, tuple[int, AsyncStream]] = {}  # streams that nobody holds any more close
        try:
            while to_do or running:
                if to_do:
                    opened = await self.calls.call(
                        lambda: self._open_feeds(to_do, ticket, must=not running), is_skippable=True
                    )
                    for turn, (index, stream, append) in opened.items():
                        running[turn] = index, stream
                        if timeout_s is not None:
                            self._expire_in(timeout_s, append)
                finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for turn in finished:
                    turn.result()
                    index, stream = running.pop(turn)
                    spans = conversations[index].spans
                    done[index] = moderation(stream._state, ticket.policy, stream.verdict, spans)
                    stream.abandon()  # now: the next may need its place
        finally:
            for turn in turns:
                self.calls.forget(turn)
        return [done[index] for index in range(len(turns))]

    async def _answer(
        self, answering: Answering, prompts: Sequence[Prompt], prepared: Prepared
    ) -> list[GenModeration]:
        engine, calls = self.engine, self.calls
        futures = [calls.new_future() for _ in prompts]
        try:
            await calls.call(lambda: self.thread.answer(answering, prompts, prepared.mode, futures))
            jobs: list[Job] = await asyncio.gather(*futures)
            return [engine.conversations.outcome(job, prepared.policy) for job in jobs]
        finally:
            for future in futures:
                future.cancel()  # those that are not done: the thread drops their conversations
                calls.forget(future)

    def _open_feeds(
        self, to_do: deque[tuple[int, Whole, Future]], ticket: Ticket, *, must: bool
    ) -> dict[Future, tuple[int, AsyncStream, Append]]:
        """Open as many as there is room for. On the thread. Raises Overloaded where there is none for one that
        `must`."""
        opened: dict[Future, tuple[int, AsyncStream, Append]] = {}
        if must:
            self._check_not_full(ticket.tenant)
        while to_do and not self.thread.is_full(ticket.tenant):
            index, whole, turn = to_do[0]
            state = open_feed(self.engine.core, whole.feed, ticket, must=must and not opened)
            if state is None:
                break
            to_do.popleft()
            opened[turn] = (index, *self._opened(state, turn, []))
        return opened

    def _check_not_full(self, tenant: str) -> None:
        if self.thread.is_full(tenant):
            raise Overloaded(
                f"appends of tenant {tenant!r} wait for room, which a new stream would take from them; close "
                "streams, or retry when they are done"
            )

    def _expire_in(self, seconds: float, append: Append) -> None:
        """Give up waiting for what a stream was opened with after a time."""
        timer = self.calls.bind().call_later(seconds, self.calls.expire, append)
        append.future.add_done_callback(lambda _: timer.cancel())

    def _opened(
        self, state: StreamState, turn: Future, unrecorded: list[Append]
    ) -> tuple[AsyncStream, Append]:
        """A handle on a new stream, whose `turn` is done when all of its labels are there. On the thread, so that a
        handle that nobody waits for any more closes its stream."""
        end = state.wanted[-1].position + 1  # not the header of a reply that is empty
        append = Append(state, turn, unrecorded, end=end)
        self.thread.expect(append)
        return AsyncStream(self, self.thread, state, turn, unrecorded), append

    # -- the engine itself ---------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine, once it is loaded. Its methods are the thread's."""
        return self.thread.loaded

    @property
    def info(self) -> EngineInfo:
        """What the engine is, once it is loaded."""
        return self.engine.info

    async def stats(self) -> dict[str, Any]:
        """As `Engine.stats`, and appends_waiting: those that were not accepted yet; lag_s: for how long the append
        or conversation that waits longest has waited to be answered, 0 where none does."""
        stats: dict[str, Any] = await self.calls.call(
            lambda: {**self.engine.stats(), "lag_s": self.thread.lag_s()}
        )
        return {**stats, "appends_waiting": len(self.calls.unaccepted)}

    async def health(self, timeout_s: float = 5.0) -> dict[str, Any]:
        """Run one token through the model and report, like `Engine.health`, but in time.

        Args:
            timeout_s: Seconds until the answer, at most. It is "stalled" when the engine's thread has not come to it by
                then, because it hangs in a step or is loading; "failing" also when the thread has ended by an error.
        """
        check_timeout(timeout_s)
        thread = self.thread
        if thread.error is None and (self._health is None or self._health.done()):
            self._health = self.calls.new_future()
            self.calls.send(Call(lambda: self.engine.health(), self._health))
        if thread.error is None and self._health is not None:
            await asyncio.wait([self._health], timeout=timeout_s)
            if self._health.done() and self._health.exception() is None:
                return dict(self._health.result())
        if thread.error is None and self._health is not None and self._health.done():
            self._health.result()  # raises
        return report_unanswered(thread, timeout_s)

    async def check_integrity(self) -> None:
        """Raise IntegrityError if the engine's books contradict each other. For tests and debugging."""
        await self.calls.call(lambda: self.engine.check_integrity())

    async def close(self, *, drain: bool = True, timeout_s: float | None = 30.0) -> None:
        """Take no more calls, and close the engine with its streams and its thread.

        Closing twice is fine; when this is cancelled, closing goes on.

        Args:
            drain: Whether to compute all tokens first that were accepted or find room, and to deliver their labels.
            timeout_s: Seconds until calls that are not done raise StreamClosed; None: no limit. A step that is under
                way at that time is not waited for any longer: the thread closes the engine after it.
        """
        timeout_s = None if timeout_s is None else check_timeout(timeout_s)
        calls = self.calls
        calls.bind()
        reason = StreamClosed("the engine has been closed; make a new one")
        calls.flush()
        calls.refuse(reason, also_waiting=not drain)
        if drain:
            self.thread.stop()
        else:
            self.thread.abort()
        try:
            await asyncio.wait_for(calls.ended.wait(), timeout_s)
        except TimeoutError:
            calls.refuse(reason, also_waiting=True)
            self.thread.abort()
        else:
            self.thread.join()
