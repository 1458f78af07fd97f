"""GuardedChat: a conversation with an LLM of which only what the guard has cleared is shown. Knows no command line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from guardengine.guarding.pull_ahead import PullAhead
from guardengine.terminal.judges import AsyncReply, Open
from guardengine.terminal.llm import Upstream
from guardengine.terminal.printer import JudgedText, Printer

_MAX_AHEAD = 16  # deltas


class GuardedChat:
    """messages: the conversation so far. Turns that were blocked or failed are not in it, so that the next goes on from
    before them; of a reply that was cancelled it has what was shown."""

    def __init__(
        self, opened: Open, upstream: Upstream, printer: Printer, tell: Callable[[str], None]
    ) -> None:
        """tell: called with what is to be said besides the reply."""
        self._opened, self._upstream, self._printer, self._tell = opened, upstream, printer, tell
        self.messages: list[dict[str, str]] = []

    def reset(self) -> None:
        self.messages = []

    async def turn(self, text: str) -> None:
        """Judge the user's text, have the LLM reply, and show what is cleared of that. Raises what the guard raises,
        and ServerError for the LLM's server; the turn has not happened then."""
        asked = [*self.messages, {"role": "user", "content": text}]
        stream = await self._opened(asked)
        try:
            if stream.verdict["action"] == "block":
                self._tell(
                    f"blocked: the prompt is {_why(stream.verdict)}; it was not sent to {self._upstream.model}"
                )
                return
            reply = JudgedText(self._printer, is_guarded=True)
            try:
                await self._relay(asked, stream, reply)
            except asyncio.CancelledError:
                self._keep(asked, reply.shown)
                raise
            finally:
                if reply.shown:
                    self._printer.end()
            verdict = stream.verdict
            if verdict["action"] == "block":
                self._tell(
                    f"blocked: the reply is {_why(verdict)}; it was stopped, and the turn is forgotten"
                )
                return
            self._keep(asked, reply.text)
            if not reply.text:
                self._tell(f"{self._upstream.model} said nothing")
        finally:
            await stream.close()

    async def _relay(self, asked: list[dict[str, str]], stream: AsyncReply, reply: JudgedText) -> None:
        ahead = PullAhead(self._upstream.deltas(asked), _MAX_AHEAD)
        ahead.start()
        try:
            while deltas := await ahead.take():
                text = "".join(deltas)
                reply.add(text, await stream.append(text))
                if stream.verdict["action"] == "block":
                    return
            reply.add("", await stream.finish(), is_over=True)
        finally:
            await ahead.close()

    def _keep(self, asked: list[dict[str, str]], text: str) -> None:
        if text:
            self.messages = [*asked, {"role": "assistant", "content": text}]


def _why(verdict: dict[str, Any]) -> str:
    category = "" if verdict["category"] is None else f", {verdict['category']}"
    return f"{verdict['risk']}{category} (rule {verdict['rule']})"
