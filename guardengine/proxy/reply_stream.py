"""ModeratedStream: the events of an LLM's reply in, and out of them what the guard has cleared.

An event goes out as it came, byte for byte, when all text in it is cleared; of one that is cleared in part a rewritten
one goes out first and the rest later. Events of one choice stay in order; choices do not wait for each other; what has
no choice (usage) waits for all that came before it, comments for nothing. No web framework.

What is held is no HeldItems (guarding/held.py), which is one reply in one order: here an event has parts of several
choices, goes out unchanged only where all of them may, and a choice's last part waits for the choice's end, not for a
number of characters. The loop is not `relay` either: choices are judged side by side, and a choice's next piece is
appended while the one before is computed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from guardengine.guarding.pull_ahead import PullAhead
from guardengine.labels import Label
from guardengine.proxy import answers
from guardengine.proxy.choice import ChoiceGuard
from guardengine.proxy.errors import UpstreamError
from guardengine.proxy.events import Event
from guardengine.proxy.parts import Json, Part, read_object, read_parts
from guardengine.proxy.settings import ProxySettings

logger = logging.getLogger("guardengine.proxy")

_MAX_AHEAD = 64
_LAST_BYTES_S = 0.05  # after [DONE]


@dataclass(slots=True, eq=False)
class _Held:
    """An event that has not gone out, or not all of it."""

    raw: bytes
    chunk: Json
    parts: list[Part]
    is_whole: bool = True  # nothing of it is out or dropped


class ModeratedStream:
    """One reply. `frames` gives its bytes; afterwards `outcome` says how it ended: "done", "cut", "error" (its own or
    the upstream's), or "left" where nobody read it to its end."""

    def __init__(
        self,
        events: AsyncIterator[Event],
        guards: list[ChoiceGuard],
        prompt: Label | None,
        model: str,
        settings: ProxySettings,
    ) -> None:
        self._source = PullAhead(events, _MAX_AHEAD)
        self._guards, self._prompt, self._model, self._settings = guards, prompt, model, settings
        self._held: deque[_Held] = deque()
        self._out: list[bytes] = []
        self._first: Json | None = None  # chunk
        self._told: set[ChoiceGuard] = set()  # that are cut, whose end is out
        self._has_ended = False  # the upstream has said so
        self._is_failing = False  # it sent an error
        self._done = answers.DONE
        self.outcome = "left"

    def start(self) -> None:
        """Begin to read the upstream."""
        self._source.start()

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Ends in `[DONE]`, or in an error where the reply could not be shown to its end. Raises UpstreamError instead
        while nothing has been shown."""
        self.start()
        has_begun = False
        try:
            async with aclosing(self._moderated()) as moderated:
                async for shown in moderated:
                    has_begun = True
                    yield shown
        except UpstreamError as error:
            await self._source.close()
            logger.warning("%s", error)
            self.outcome = "error"
            if not has_begun:
                raise
            yield answers.event(error.envelope)
        finally:
            await self.close()

    async def close(self) -> None:
        """Hang up on the upstream, and drop what is judged. Closing twice is fine."""
        for guard in self._guards:
            guard.close()
        await self._source.close()

    # -- the loop ------------------------------------------------------------------------------------------

    async def _moderated(self) -> AsyncGenerator[bytes, None]:
        taking: asyncio.Task[list[Any]] | None = None
        error: UpstreamError | None = None
        try:
            while True:
                if taking is None and not self._has_ended and error is None and self._has_room:
                    taking = asyncio.create_task(self._source.take())
                for guard in self._guards:
                    guard.feed()
                waits: set[asyncio.Task[Any]] = {task for guard in self._guards for task in guard.tasks}
                if taking is not None:
                    waits.add(taking)
                if waits:
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if taking is not None and taking.done():
                    try:
                        self._add(taking.result())
                    except UpstreamError as raised:
                        error = raised  # after what is judged by now
                    taking = None
                for guard in self._guards:
                    guard.settle()
                self._release()
                if self._is_over:
                    end = self._end()
                    if self.outcome != "done":
                        await self._source.close()  # the LLM need not go on until somebody has read the end
                    yield end
                    # A connection that is read to its end is used again.
                    with suppress(TimeoutError, UpstreamError):
                        async with asyncio.timeout(_LAST_BYTES_S):
                            await self._source.take()
                    return
                if error is not None and not any(guard.tasks for guard in self._guards):
                    if shown := self._taken():
                        yield shown
                    raise error
                if shown := self._taken():
                    yield shown
        finally:
            if taking is not None:
                taking.cancel()

    @property
    def _has_room(self) -> bool:
        """Whether more is taken: what is held without anything under way only more text can clear."""
        is_judging = any(guard.tasks for guard in self._guards)
        return not is_judging or sum(guard.num_held for guard in self._guards) < self._settings.max_held_chars

    @property
    def _is_over(self) -> bool:
        if all(guard.is_cut for guard in self._guards) or self._is_failing:
            return True
        if self._settings.on_block == "error" and any(guard.is_cut for guard in self._guards):
            return True
        return self._has_ended and all(guard.is_over for guard in self._guards) and not self._held

    def _end(self) -> bytes:
        verdicts = [guard.verdict for guard in self._guards]
        blocked = next((guard.verdict for guard in self._guards if guard.is_cut), None)
        self.outcome = "done" if blocked is None else "cut"
        if self._is_failing:
            self.outcome = "error"
        elif blocked is not None and self._settings.on_block == "error":
            self._out.append(answers.event(answers.blocked_error(blocked, "reply")))
        self._out += [answers.comment(self._prompt, verdicts), self._done]
        return self._taken()

    def _taken(self) -> bytes:
        out, self._out = b"".join(self._out), []
        return out

    # -- in ------------------------------------------------------------------------------------------------

    def _add(self, events: list[Event]) -> None:
        if not events:
            if not all(guard.is_ending or guard.is_over for guard in self._guards):
                raise UpstreamError(
                    "the upstream's stream ended before the reply did; what was not judged is not shown",
                    "upstream_truncated",
                )
            self._has_ended = True
        for event in events:
            if event.data is None:
                self._out.append(event.raw)
            elif event.data.strip() == b"[DONE]":
                for guard in self._guards:
                    guard.end()
                self._has_ended, self._done = True, event.raw
                return
            else:
                self._add_chunk(event, event.data)
                if self._is_failing:
                    return

    def _add_chunk(self, event: Event, data: bytes) -> None:
        chunk = read_object(data, "an event")
        if chunk.get("error") and not chunk.get("choices"):
            self._is_failing = True
            self._held.append(_Held(event.raw, chunk, []))
            return
        if self._first is None:
            self._first = chunk
        self._held.append(_Held(event.raw, chunk, read_parts(chunk, self._guards, "delta")))

    # -- out -----------------------------------------------------------------------------------------------

    def _release(self) -> None:
        """Put out what is cleared by now of what is held, and the ends of choices that are cut."""
        held, self._held = self._held, deque()
        waiting: set[ChoiceGuard] = set()  # choices of which something earlier is held
        for each in held:
            if not each.parts:
                if (waiting or self._held) and not self._is_failing:
                    self._held.append(each)
                else:
                    self._out.append(each.raw)
                continue
            self._release_parts(each, waiting)
            if each.parts:
                self._held.append(each)
        for guard in self._guards:
            if guard.is_cut and guard not in self._told:
                self._told.add(guard)
                if self._settings.on_block != "error":
                    head = answers.head_of(self._first, self._model, "chat.completion.chunk")
                    self._out.append(answers.end_chunk(head, self._guards.index(guard), self._settings))

    def _release_parts(self, each: _Held, waiting: set[ChoiceGuard]) -> None:
        parts = each.parts
        if each.is_whole and all(part.is_ready and part.guard not in waiting for part in parts):
            self._out.append(each.raw)
            each.parts = []
            return
        each.parts = []
        for part in parts:
            guard = part.guard
            if guard in self._told:
                each.is_whole = False
            elif guard in waiting:
                each.parts.append(part)
            elif part.is_ready:
                each.is_whole = False
                upto = max((text.end for text in part.texts), default=0)
                delta = part.piece(upto) if part.has_begun else part.choice["delta"]
                self._put({**each.chunk, "choices": [{**part.choice, "delta": delta}]})
            else:
                if delta := part.piece(guard.cleared):
                    each.is_whole = False
                    index = self._guards.index(guard)
                    head = answers.head_of(each.chunk, self._model, "")
                    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
                    self._put({**head, "choices": [choice]})
                if guard.is_cut:
                    each.is_whole = False
                else:
                    each.parts.append(part)
                    waiting.add(guard)

    def _put(self, chunk: Json) -> None:
        self._out.append(answers.event(chunk))
