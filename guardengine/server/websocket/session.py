"""StreamSession: one stream of a WebSocket. Takes its operations in order, runs them, and tells what came of each.

An append that is refused leaves a hole, which a judged reply must not have: from then on appends are refused until the
client says `retry`, which it does once it has seen the refusal. No web framework.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from guardengine.engine.async_engine import AsyncEngine
from guardengine.engine.async_stream import AsyncStream
from guardengine.errors import ConfigError, GuardEngineError, StreamClosed
from guardengine.labels import Label, Verdict
from guardengine.policy import Policy
from guardengine.server import json_values
from guardengine.server.refusals import Refusal, refusal_of
from guardengine.server.schemas import plain_messages
from guardengine.server.service import Service
from guardengine.server.websocket.protocol import (
    Append,
    Close,
    Finish,
    Fork,
    Open,
    PastAppend,
    PastFinish,
    PastRollback,
    Rollback,
)

Event = dict[str, Any]
_MOST_MERGED = 2**16  # characters

_DRAINED = object()


class Link(NamedTuple):
    """What a session needs of its connection."""

    service: Service
    engine: AsyncEngine
    tenant: str
    emit: Callable[[Event], Coroutine[Any, Any, None]]
    branch: Callable[[str, StreamSession], None]  # raises Refusal
    forget: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Wishes:
    """How a stream is judged and what is told of it."""

    policy: Policy
    labels: str = "all"
    scores: bool = True


@dataclass(slots=True)
class _Told:
    """What the client knows."""

    appends: int = 0  # that were accepted
    num_labels: int = 0
    verdict: Verdict | None = None
    is_finished: bool = False  # the reply, nothing of which is left to come


class StreamSession:
    """One stream, from its first operation to its end. `task` runs it."""

    def __init__(self, link: Link, name: str, wishes: _Wishes, told: _Told | None = None) -> None:
        self._link, self.name, self._wishes = link, name, wishes
        self._told = told or _Told()
        self._queue: asyncio.Queue[Any] = asyncio.Queue(link.service.settings.max_queued_operations)
        self._is_refusing = False
        self._stream: AsyncStream
        self.task: asyncio.Task[None] | None = None  # None: a branch that is being made

    @staticmethod
    def start(link: Link, opening: Open) -> StreamSession:
        """Begin a stream. Raises Refusal for a policy that cannot be."""
        policy = link.service.settings.policy if opening.policy is None else opening.policy.policy()
        session = StreamSession(link, opening.stream, _Wishes(policy, opening.labels, opening.scores))
        session.task = asyncio.create_task(session._run(lambda: session._open(opening)))
        return session

    async def put(self, operation: Any) -> None:
        """Hand over the next operation; waits while too many do already. For a session with a task."""
        try:
            self._queue.put_nowait(operation)
        except asyncio.QueueFull:
            put = asyncio.create_task(self._queue.put(operation))
            ends = [put] if self.task is None else [put, self.task]
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                put.cancel()

    def drain(self) -> None:
        """The server is going: end when the reply has."""
        if self._told.is_finished and self._queue.empty():
            self._queue.put_nowait(_DRAINED)

    # -- the task ------------------------------------------------------------------------------------------

    async def _run(self, begin: Callable[[], Coroutine[Any, Any, None]]) -> None:
        service, reason = self._link.service, "closed"
        service.metrics.streams.inc()
        try:
            with service.drain.work():
                try:
                    await begin()
                except (GuardEngineError, Refusal) as error:
                    await self._refuse(error, "open")
                    return
                try:
                    reason = await self._serve()
                except StreamClosed as error:  # by its idle time, or with the engine
                    await self._refuse(error, None)
                    reason = "stream_closed"
                except BaseException:
                    self._stream.abandon()
                    raise
                await self._stream.close()
                await self._emit("closed", reason=reason)  # it counts until the client has room for this
        finally:
            self._link.forget(self.name)
            service.metrics.streams.dec()
            self.task = None  # whose error, where it was cancelled, holds this call

    async def _serve(self) -> str:
        """Run operations to the end; returns why it came."""
        waiting: Any = None
        while True:
            operation = waiting if waiting is not None else await self._queue.get()
            waiting = None
            if operation is _DRAINED:
                return "draining"
            if isinstance(operation, Close):
                return "closed"
            try:
                match operation:
                    case Append():
                        waiting = await self._append(operation)
                    case Finish():
                        self._check_retry(operation.retry)
                        await self._stream.finish_text(timeout_s=operation.timeout_s)
                        self._told.is_finished = True
                        await self._tell("finished")
                    case Rollback():
                        await self._stream.rollback(self._num_to_drop(operation))
                        self._after_rollback()
                        await self._tell("rolled_back")
                    case Fork():
                        await self._fork(operation)
            except StreamClosed:
                raise
            except (GuardEngineError, Refusal) as error:
                if isinstance(operation, Append | Finish):
                    self._is_refusing = True
                await self._refuse(error, operation.type)
            if self._told.is_finished and self._link.service.drain.has_begun and self._queue.empty():
                return "draining"

    async def _open(self, opening: Open) -> None:
        engine, began = self._link.engine, time.perf_counter()
        messages = None if opening.messages is None else plain_messages(opening.messages)
        salt = None if opening.cache_salt is None else f"{self._link.tenant}\0{opening.cache_salt}"
        self._stream = stream = await engine.open(
            messages,
            token_ids=opening.token_ids,
            role=opening.role,
            policy=self._wishes.policy,
            tenant=self._link.tenant,
            cache_salt=salt,
            priority=opening.priority,
            timeout_s=opening.timeout_s,
        )
        try:
            self._link.service.metrics.prompt_tokens.inc(stream.num_tokens)
            for past in opening.history:
                await self._repeat(past)
            await self._emit("opened")
            label = await stream.prompt()
            self._link.service.metrics.first_label.observe(time.perf_counter() - began)
            await self._emit(
                "prompt",
                label=json_values.prompt_json(label),
                verdict=json_values.verdict_json(stream.verdict),
            )
            self._told.num_labels = min(opening.num_labels, stream.num_labels)
            await self._tell("finished" if self._told.is_finished else "labels")
        except BaseException:
            stream.abandon()
            raise

    async def _repeat(self, past: PastAppend | PastFinish | PastRollback) -> None:
        """An operation that was done on another connection."""
        match past:
            case PastAppend():
                await self._feed(past, None)
                self._told.appends += 1
                self._told.is_finished = False
            case PastFinish():
                await self._stream.finish_text()
                self._told.is_finished = True
            case PastRollback():
                await self._stream.rollback(self._num_to_drop(past))
                self._after_rollback()

    # -- operations ----------------------------------------------------------------------------------------

    async def _append(self, first: Append) -> Any:
        """Feed an append, and those after it in one go where they are more of the same text; returns what was taken
        off the queue besides."""
        self._check_retry(first.retry)
        appends, waiting = [first], None
        num_chars = len(first.text or "")
        while first.text is not None and first.role == "assistant" and not self._queue.empty():
            waiting = self._queue.get_nowait()
            if not _goes_on(first, waiting) or num_chars + len(waiting.text) > _MOST_MERGED:
                break
            appends.append(waiting)
            num_chars += len(waiting.text)
            waiting = None
        if len(appends) > 1:
            try:
                whole = "".join(append.text or "" for append in appends)
                await self._feed_and_tell(first.model_copy(update={"text": whole}), len(appends))
                return waiting
            except StreamClosed:
                raise
            except GuardEngineError:
                pass  # one by one, so that what fits is not refused with the rest
        for append in appends:
            try:
                self._check_retry(append.retry)
                await self._feed_and_tell(append, 1)
            except StreamClosed:
                raise
            except (GuardEngineError, Refusal) as error:
                self._is_refusing = True
                await self._refuse(error, "append")
        return waiting

    async def _feed_and_tell(self, append: Append, count: int) -> None:
        began, before = time.perf_counter(), self._stream.num_labels
        await self._feed(append, append.timeout_s)
        took, metrics = time.perf_counter() - began, self._link.service.metrics
        metrics.chunk_latency.observe(took)
        if num_labels := self._stream.num_labels - before:
            metrics.inter_token.observe(took / num_labels)
        self._told.appends += count
        self._told.is_finished = False
        if append.role == "user":
            label = await self._stream.prompt()
            verdict = json_values.verdict_json(self._stream.verdict)
            await self._emit("prompt", label=json_values.prompt_json(label), verdict=verdict)
        await self._tell("labels")

    async def _feed(self, append: Append | PastAppend, timeout_s: float | None) -> None:
        if append.text is None:
            await self._stream.append(append.token_ids or [], append.role, timeout_s=timeout_s)
        elif append.role == "assistant":
            await self._stream.append_text(append.text, timeout_s=timeout_s)
        else:
            chat = self._link.engine.engine.chat
            if chat is None:
                raise ConfigError("the checkpoint has no tokenizer.json; append token_ids")
            most = self._link.engine.info.max_model_len
            ids = await asyncio.to_thread(chat.tokenizer.encode_text, append.text, max_tokens=most)
            await self._stream.append(ids, "user", timeout_s=timeout_s)

    async def _fork(self, fork: Fork) -> None:
        branch = StreamSession(self._link, fork.new_stream, self._wishes, replace(self._told))
        self._link.branch(fork.new_stream, branch)
        try:
            branch._stream = await self._stream.fork()
        except BaseException:
            self._link.forget(fork.new_stream)
            raise

        async def begin() -> None:
            await branch._emit("forked", parent=self.name)

        branch.task = asyncio.create_task(branch._run(begin))

    def _check_retry(self, retry: bool) -> None:
        if self._is_refusing and not retry:
            raise Refusal(
                409,
                "an append before this one was refused, and a reply has no holes; send again from there on, the first "
                "with retry: true",
                "append_refused",
            )
        self._is_refusing = False

    def _num_to_drop(self, rollback: Rollback | PastRollback) -> int:
        if rollback.num_tokens is not None:
            return rollback.num_tokens
        return self._stream.num_tokens - (rollback.to_num_tokens or 0)

    def _after_rollback(self) -> None:
        self._is_refusing = False
        self._told.num_labels = min(self._told.num_labels, self._stream.num_labels)
        self._told.is_finished = False

    # -- what is told --------------------------------------------------------------------------------------

    async def _tell(self, kind: str) -> None:
        """Labels that the client does not have, and what the verdict is by now."""
        stream, told, wishes = self._stream, self._told, self._wishes
        labels = stream.labels_from(told.num_labels)
        told.num_labels += len(labels)
        self._link.service.metrics.generation_tokens.inc(len(labels))
        shown = [
            json_values.label_json(label, stream.span(label), with_scores=wishes.scores)
            for label in labels
            if self._is_wanted(label)
        ]
        await self._emit(kind, labels=shown, verdict=json_values.verdict_json(stream.verdict))
        await self._tell_verdict()

    async def _tell_verdict(self) -> None:
        """Say so where the verdict is another one than before."""
        verdict, last = self._stream.verdict, self._told.verdict
        self._told.verdict = verdict
        if last is not None and (last.action, last.rule) == (verdict.action, verdict.rule):
            return
        if last is None and verdict.action == "allow" and verdict.rule == "none":
            return
        metrics, is_prompt = self._link.service.metrics, verdict.rule.startswith("prompt")
        metrics.judged(verdict, "user" if is_prompt else "assistant")
        if verdict.position is not None and not is_prompt:
            metrics.detection_lag.observe(self._stream.num_tokens - 1 - verdict.position)
        await self._emit("verdict", verdict=json_values.verdict_json(verdict))

    def _is_wanted(self, label: Label) -> bool:
        wanted = self._wishes.labels
        return wanted == "all" or (wanted == "flagged" and self._wishes.policy.hit(label) is not None)

    async def _emit(self, kind: str, **more: Any) -> None:
        """An event with where the stream is."""
        stream = self._stream
        event = {"type": kind, "stream": self.name, "appends": self._told.appends, **more}
        if kind != "closed":
            event |= {
                "num_tokens": stream.num_tokens,
                "num_labels": self._told.num_labels,
                "cleared_chars": stream.cleared_chars,
                "held_chars": len(stream.held_text),
            }
        await self._link.emit(event)

    async def _refuse(self, error: BaseException, operation: str | None) -> None:
        service = self._link.service
        refusal = refusal_of(error, service.settings.retry_after_s)
        service.metrics.refused.labels(refusal.code).inc()
        event = {"type": "error", "stream": self.name, "operation": operation, "appends": self._told.appends}
        await self._link.emit(event | refusal.envelope)


def _goes_on(first: Append, other: Any) -> bool:
    """Whether an operation is more text that may be fed together with the append before it."""
    return (
        isinstance(other, Append)
        and other.text is not None
        and other.role == "assistant"
        and (other.timeout_s, other.retry) == (first.timeout_s, False)
    )
