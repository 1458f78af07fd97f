"""Whole conversations through AsyncEngine, for one tenant, as many at a time as fit. No web framework.

As AsyncEngine.moderate_many, but apart from other tenants, with a deadline, and with the text's spans.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from guardengine.engine.async_engine import AsyncEngine
from guardengine.engine.async_stream import AsyncStream
from guardengine.errors import GuardEngineError, Overloaded
from guardengine.labels import Label, Verdict
from guardengine.policy import Policy
from guardengine.text.spans import Span

Message = Mapping[str, Any]


class BadConversation(Exception):
    """What a conversation was refused for, and which it is. The cause is the error."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class Judged(NamedTuple):
    """What came of one conversation.

    response: the policy on the reply's labels alone, None where the conversation ends with the user. verdict: on all of
    it, unjudged tokens included. shift: characters of the reply before the text that spans count from.
    """

    prompt: Label | None
    labels: list[Label]
    spans: list[Span | None]
    shift: int
    response: Verdict | None
    verdict: Verdict
    is_complete: bool
    num_tokens: int


class Whose(NamedTuple):
    """For whom and how conversations are judged."""

    policy: Policy
    tenant: str = ""
    timeout_s: float | None = None


async def judge_many(
    engine: AsyncEngine, conversations: Sequence[Sequence[Message]], whose: Whose, max_parallel: int
) -> list[Judged]:
    """Judge conversations beside the open streams; results in order.

    Raises BadConversation from what `AsyncEngine.open` or an append raises, and Overloaded when not even one fits.
    """
    to_do = deque(enumerate(conversations))
    running: dict[asyncio.Task[Judged], int] = {}
    found: dict[int, Judged] = {}
    try:
        while to_do or running:
            while to_do and len(running) < max_parallel:
                index, messages = to_do[0]
                try:
                    task = await _begin(engine, messages, whose)
                except Overloaded:
                    if not running:
                        raise
                    break  # until one of ours makes room
                except GuardEngineError as error:
                    raise BadConversation(index) from error
                to_do.popleft()
                running[task] = index
            finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                index = running.pop(task)
                try:
                    found[index] = task.result()
                except Overloaded:
                    raise
                except GuardEngineError as error:
                    raise BadConversation(index) from error
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return [found[index] for index in range(len(conversations))]


async def _begin(engine: AsyncEngine, messages: Sequence[Message], whose: Whose) -> asyncio.Task[Judged]:
    """A task for a conversation that has found room."""
    reply, shift = _plain_reply(messages)
    stream = await engine.open(
        messages if reply is None else messages[:-1],
        policy=whose.policy,
        tenant=whose.tenant,
        timeout_s=whose.timeout_s,
    )
    has_reply = messages[-1].get("role") == "assistant"
    return asyncio.create_task(_finish(stream, whose, reply, shift, has_reply))


async def _finish(
    stream: AsyncStream, whose: Whose, reply: str | None, shift: int, has_reply: bool
) -> Judged:
    try:
        if reply is not None:
            await stream.append_text(reply, is_final=True, timeout_s=whose.timeout_s)
        elif has_reply:
            await stream.finish_text(timeout_s=whose.timeout_s)
        prompt, labels = await stream.prompt(), stream.labels
        # A verdict's rule says whether tokens went unjudged, where they were let pass as well.
        is_complete = prompt is not None and not stream.num_pending_tokens
        judged = Judged(
            prompt,
            labels,
            [stream.span(label) for label in labels],
            shift,
            whose.policy.judge(labels) if has_reply else None,
            stream.verdict,
            is_complete,
            stream.num_tokens,
        )
    except BaseException:
        stream.abandon()
        raise
    await stream.close()
    return judged


def _plain_reply(messages: Sequence[Message]) -> tuple[str | None, int]:
    """A last reply that may be fed as text, which gives its tokens their places, and the newlines before it.

    Those that the template takes apart, or that would be tokenized together with what it writes before them, are
    rendered with the rest, so that every conversation has the ids that `Engine.moderate` gives it.
    """
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        return None, 0
    if messages[-2].get("role") not in ("user", "tool"):
        return None, 0
    last = messages[-1]
    content = last.get("content")
    if not isinstance(content, str) or any(
        value is not None for name, value in last.items() if name not in ("role", "content")
    ):
        return None, 0
    text = content.lstrip("\n")  # as the template does
    if not text or text[0].isspace() or "<think>" in text or "</think>" in text:
        return None, 0
    return text, len(content) - len(text)
