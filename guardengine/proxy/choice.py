"""ChoiceGuard: one choice of a reply on one guard stream. Takes text of any of its fields, says what may be shown.

All fields (content, reasoning, refusal, tools' names and arguments) are one text for the guard, in the order in which
they come, a line break between two fields. Where a field goes on after another one, its last characters are given
again: a word that is cut in two by another field must be seen as the client will see it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from guardengine.engine.async_stream import AsyncStream
from guardengine.errors import GuardEngineError, Overloaded, StreamTooLong
from guardengine.guarding.feeding import finish_reply
from guardengine.labels import Verdict
from guardengine.policy import Failure, Policy
from guardengine.proxy.errors import broken

_TAIL = 200  # characters of a field that are given again
_MOST_APPENDS = 2  # under way: one in the engine's step, one for the next
_UNJUDGED = Verdict("allow", "Safe", None, None, "overload-open", 0)


class ChoiceGuard:
    """One choice. `stream`: of the prompt, or forked from it, and closed at the end; None: nothing is judged, because
    there was no room and the policy lets that pass.

    is_cut: it is blocked. is_over: it is blocked, or all of it was given, judged and may be shown.
    """

    def __init__(self, stream: AsyncStream | None, policy: Policy, timeout_s: float) -> None:
        self._stream, self._policy, self._timeout_s = stream, policy, timeout_s
        self.num_given = 0  # characters, those given again included
        self.is_ending = self.is_over = self.is_cut = False
        self._waiting = ""  # given, not appended
        self._has_ended = False  # finish_reply was called
        self._tasks: list[asyncio.Task[Any]] = []
        self._fields: tuple[Any, ...] = ()
        self._tails: dict[Any, str] = {}
        self._passes = stream is None  # unjudged
        self._own_verdict: Verdict | None = None if stream is not None else _UNJUDGED

    # -- in ------------------------------------------------------------------------------------------------

    def give(self, fields: tuple[Any, ...], text: str) -> int:
        """More text of a field, or of several that have the same; returns at which of the guard's characters it begins.
        Raises UpstreamError for fields that had not the same text before."""
        tail = self._tails.get(fields[0], "")
        if any(self._tails.get(field, "") != tail for field in fields):
            raise broken("one text in two fields that differed before")
        if fields != self._fields:
            self._fields = fields
            self._take(("\n" if self.num_given else "") + tail)
        for field in fields:
            self._tails[field] = (tail + text)[-_TAIL:]
        start = self.num_given
        self._take(text)
        return start

    def end(self) -> None:
        """No more text comes."""
        self.is_ending = True

    def _take(self, text: str) -> None:
        self._waiting += text
        self.num_given += len(text)

    @property
    def num_held(self) -> int:
        """Characters that were given and may not be shown."""
        return 0 if self.is_over else self.num_given - self.cleared

    # -- judging -------------------------------------------------------------------------------------------

    def feed(self) -> None:
        """Append what waits, where not too many appends are under way; begin the end where nothing waits."""
        if self.is_over:
            return
        if self._passes or self._stream is None:
            self._waiting, self.is_over = "", self.is_ending
            return
        if self._waiting and len(self._tasks) < _MOST_APPENDS:
            text, self._waiting = self._waiting, ""
            self._start(self._stream.append_text(text, timeout_s=self._timeout_s))
        if self.is_ending and not self._waiting and not self._has_ended:
            self._has_ended = True
            self._start(finish_reply(self._stream, True, self._timeout_s))

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        """What is under way."""
        return self._tasks

    def settle(self) -> None:
        """See what those that are done have come to."""
        while self._tasks and self._tasks[0].done():
            task = self._tasks.pop(0)
            if not task.cancelled() and (error := task.exception()) is not None:
                self._fail(error)
        if self.is_over or self._stream is None or self._passes:
            return
        if self._stream.verdict.action == "block":
            self._cut()
        elif self._has_ended and not self._tasks:
            self.is_over = True

    def _start(self, judging: Coroutine[Any, Any, Any]) -> None:
        self._tasks.append(asyncio.create_task(judging))

    def _fail(self, error: BaseException) -> None:
        """What an append raised: text that nobody judged, which the policy lets pass or not."""
        failure: Failure = "overload" if isinstance(error, Overloaded) else "error"
        # Else the engine has gone, or its log cannot be written.
        may_pass = isinstance(error, Overloaded | StreamTooLong)
        if not isinstance(error, GuardEngineError):
            raise error
        if self.is_over or self._stream is None:
            return
        if may_pass and getattr(self._policy, f"on_{failure}") == "open":
            self._passes, self._own_verdict = True, replace(self._stream.verdict, rule=f"{failure}-open")
            return
        if self._stream.verdict.action != "block":
            cleared = self._stream.verdict.cleared
            self._own_verdict = Verdict("block", "Unknown", None, None, failure, cleared)
        self._cut()

    def _cut(self) -> None:
        self.is_cut = self.is_over = True
        self._waiting = ""
        for task in self._tasks:
            task.cancel()

    # -- out -----------------------------------------------------------------------------------------------

    @property
    def cleared(self) -> int:
        """How many of the characters that were given may be shown."""
        if (self.is_over and not self.is_cut) or self._passes or self._stream is None:
            return self.num_given
        return min(self._stream.cleared_chars, self.num_given)

    @property
    def verdict(self) -> Verdict:
        if self._own_verdict is not None or self._stream is None:
            return self._own_verdict or _UNJUDGED
        return self._stream.verdict

    @property
    def num_labels(self) -> int:
        return 0 if self._stream is None else self._stream.num_labels

    def close(self) -> None:
        """Without waiting: the engine may hang."""
        for task in self._tasks:
            task.cancel()
        if self._stream is not None and not self._stream.is_closed:
            self._stream.abandon()
