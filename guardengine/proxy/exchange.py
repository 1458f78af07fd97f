"""Exchange: one chat completion: the prompt is judged while the upstream is at work on it, then its reply is."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

import httpx
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from guardengine.errors import Overloaded
from guardengine.labels import Label, Verdict
from guardengine.policy import Failure
from guardengine.proxy import answers
from guardengine.proxy.chat_request import Call
from guardengine.proxy.choice import ChoiceGuard
from guardengine.proxy.errors import UpstreamError, broken
from guardengine.proxy.metrics import ProxyMetrics
from guardengine.proxy.parts import read_object, read_parts
from guardengine.proxy.reply_stream import ModeratedStream
from guardengine.proxy.settings import ProxySettings
from guardengine.proxy.upstream import Upstream, media_type, returned
from guardengine.server.replies import AsciiJson, reply_of
from guardengine.server.service import Service

_PATH = "/v1/chat/completions"
_SLACK_S = 1.0  # for an engine that is about to say that the time is over


@dataclass(slots=True)
class Proxy:
    """What all requests of one app share."""

    service: Service
    settings: ProxySettings
    upstream: Upstream
    metrics: ProxyMetrics


class Exchange:
    """For one request. `begin` gives the answer, which closes this when it has been sent."""

    def __init__(self, proxy: Proxy, call: Call, headers: dict[str, str], tenant: str) -> None:
        self._proxy, self._call, self._headers, self._tenant = proxy, call, headers, tenant
        self._engine = proxy.service.stream_engine()
        self._policy = proxy.settings.server.policy
        self._open = AsyncExitStack()  # the upstream's answer
        self._asking: asyncio.Task[httpx.Response] | None = None
        self._guards: list[ChoiceGuard] = []
        self._label: Label | None = None  # of the prompt
        self._head_at = 0.0  # when the upstream answered
        self._outcome = "left"
        self._has_reply = False

    async def begin(self) -> Response:
        """Raises GuardEngineError or Refusal for what gets no answer; everything is closed then."""
        try:
            answer = await self._answer()
        except UpstreamError:
            self._outcome = "error"
            await self.close()
            raise
        except BaseException:
            await self.close()
            raise
        if not isinstance(answer, StreamedReply):
            await self.close()
        return answer

    async def close(self) -> None:
        """Hang up on the upstream and close the guard's streams. Closing twice is fine."""
        guards, self._guards = self._guards, []
        for guard in guards:
            guard.close()
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        await self._open.aclose()
        if self._has_reply:
            self._has_reply = False
            metrics, counts = self._proxy.metrics, self._proxy.service.metrics
            metrics.replies.labels(self._outcome).inc()
            counts.request_success.labels("stop" if self._outcome in ("done", "cut") else "abort").inc()
            for guard in guards:
                metrics.judged("reply", guard.verdict)
                counts.judged(guard.verdict, "assistant")
                counts.generation_tokens.inc(guard.num_labels)

    # -- the prompt ----------------------------------------------------------------------------------------

    async def _answer(self) -> Response:
        self._asking = asyncio.create_task(self._ask())
        began = time.perf_counter()
        verdict = await self._judge_prompt()
        counts = self._proxy.service.metrics
        counts.first_label.observe(time.perf_counter() - began)
        counts.judged(verdict, "user")
        self._proxy.metrics.judged("prompt", verdict)
        headers = answers.prompt_headers(self._label, verdict)
        if verdict.action == "block":
            return self._blocked_prompt(verdict, headers)
        waited = self._asking.done()
        response = await self._asking
        self._proxy.metrics.prompt_wait.observe(time.perf_counter() - self._head_at if waited else 0.0)
        headers |= returned(response)
        if response.status_code >= 400:
            body = await self._proxy.upstream.error_of(response)
            return Response(body, response.status_code, headers, "application/json")
        if response.status_code != 200:
            raise broken(f"status {response.status_code}")
        expected = "text/event-stream" if self._call.is_stream else "application/json"
        if media_type(response) != expected:
            raise broken(f"an answer that is no {expected}")
        self._has_reply = True
        if not self._call.is_stream:
            return await self._judge_whole(await self._proxy.upstream.whole(response), headers)
        reply = ModeratedStream(
            self._proxy.upstream.events(response),
            self._guards,
            self._label,
            self._call.model,
            self._proxy.settings,
        )
        return StreamedReply(self, reply, headers)

    async def _ask(self) -> httpx.Response:
        metrics, began = self._proxy.metrics, time.perf_counter()
        try:
            response = await self._open.enter_async_context(
                self._proxy.upstream.asked("POST", _PATH, self._headers, self._call.body)
            )
        except UpstreamError:
            metrics.upstream.labels("0").inc()
            raise
        self._head_at = time.perf_counter()
        metrics.upstream.labels(str(response.status_code)).inc()
        metrics.upstream_latency.observe(self._head_at - began)
        return response

    async def _judge_prompt(self) -> Verdict:
        """The policy on the prompt. Makes a guard for each choice where that lets it pass."""
        settings, policy, messages = self._proxy.settings, self._policy, self._call.messages
        if messages[-1]["role"] != "assistant":  # its header now, or the reply's first word would wait for it
            messages = [*messages, {"role": "assistant", "content": ""}]
        try:
            async with asyncio.timeout(settings.prompt_timeout_s + _SLACK_S):
                stream = await self._engine.open(
                    messages, policy=policy, tenant=self._tenant, timeout_s=settings.prompt_timeout_s
                )
                try:
                    self._label = await stream.prompt()
                except BaseException:
                    stream.abandon()
                    raise
        except Overloaded:
            if policy.on_overload != "open":
                raise
            return self._pass_unjudged("overload")
        except TimeoutError:  # the engine hangs
            if policy.on_timeout != "open":
                return Verdict("block", "Unknown", None, None, "timeout", 0)
            return self._pass_unjudged("timeout")
        self._proxy.service.metrics.prompt_tokens.inc(stream.num_tokens)
        verdict = stream.verdict
        if verdict.action == "block":
            stream.abandon()
            return verdict
        streams: list[Any] = [stream]
        try:
            while len(streams) < self._call.num_choices:
                streams.append(await stream.fork())
        except Overloaded:
            if policy.on_overload != "open":
                raise
            streams += [None] * (self._call.num_choices - len(streams))
        finally:
            self._guards = [ChoiceGuard(each, policy, settings.append_timeout_s) for each in streams]
        return verdict

    def _pass_unjudged(self, failure: Failure) -> Verdict:
        guards = [ChoiceGuard(None, self._policy, 1.0) for _ in range(self._call.num_choices)]
        self._guards = guards
        return Verdict("allow", "Safe", None, None, f"{failure}-open", 0)

    def _blocked_prompt(self, verdict: Verdict, headers: dict[str, str]) -> Response:
        settings, call = self._proxy.settings, self._call
        if refusal := answers.unjudged(verdict, settings.server.retry_after_s):
            return reply_of(refusal, headers)
        headers |= answers.reply_headers([verdict])
        style = settings.on_blocked_prompt
        if style == "error":
            return AsciiJson(answers.blocked_error(verdict, "prompt"), 400, headers)
        choices = [
            answers.blocked_message(style, settings.refusal, index) for index in range(call.num_choices)
        ]
        kind = "chat.completion.chunk" if call.is_stream else "chat.completion"
        head = answers.head_of(None, call.model, kind)
        if not call.is_stream:
            usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
            return AsciiJson({**head, "choices": choices, "usage": usage}, 200, headers)
        events = [
            answers.event({**head, "choices": [{"delta": choice.pop("message"), **choice}]})
            for choice in choices
        ]
        return Response(
            b"".join([*events, answers.comment(self._label, [verdict]), answers.DONE]),
            200,
            headers,
            "text/event-stream",
        )

    # -- a reply that is not streamed ----------------------------------------------------------------------

    async def _judge_whole(self, body: bytes, headers: dict[str, str]) -> Response:
        completion = read_object(body, "an answer")
        guards = self._guards
        parts = read_parts(completion, guards, "message")
        for guard in guards:
            guard.end()
        while not all(guard.is_over for guard in guards):
            for guard in guards:
                guard.feed()
            if tasks := [task for guard in guards for task in guard.tasks]:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for guard in guards:
                guard.settle()
        headers |= answers.reply_headers([guard.verdict for guard in guards])
        blocked = next((guard.verdict for guard in guards if guard.is_cut), None)
        self._outcome = "done" if blocked is None else "cut"
        if blocked is None:
            return Response(body, 200, headers, "application/json")
        settings = self._proxy.settings
        if settings.on_block == "error":
            return AsciiJson(answers.blocked_error(blocked, "reply"), 400, headers)
        choices = []
        for part in parts:
            choice = part.choice
            if part.guard.is_cut:
                kept = part.piece(part.guard.cleared)
                kept.pop("tool_calls", None)  # half of them are none
                index = choice.get("index", 0)
                choice = answers.blocked_message(settings.on_block, settings.refusal, index, kept)
            choices.append(choice)
        return AsciiJson({**completion, "choices": choices}, 200, headers)

    # -- for the streamed one ------------------------------------------------------------------------------

    def ended(self, outcome: str) -> None:
        """How the streamed reply has ended."""
        self._outcome = outcome


class StreamedReply(Response):
    """Sends a moderated stream until its end, or until the client has gone."""

    def __init__(self, exchange: Exchange, reply: ModeratedStream, headers: dict[str, str]) -> None:
        super().__init__(
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._exchange, self._reply = exchange, reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.wait((sending, leaving))
            self._exchange.ended(self._reply.outcome)
            await self._reply.close()
            await self._exchange.close()
        if not sending.cancelled():
            sending.result()

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        has_begun = False
        async with aclosing(self._reply.frames()) as frames:
            async for shown in frames:
                if not has_begun:  # until then an upstream that fails gets a status of its own
                    await send(head)
                    has_begun = True
                await send({"type": "http.response.body", "body": shown, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
