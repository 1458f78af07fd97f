"""GuardedChat: a conversation with an LLM of which only what the guard has cleared is shown. Knows no command line."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from guardengine.guarding.pull_ahead import MAX_AHEAD, PullAhead
from guardengine.guarding.relay import relay
from guardengine.integrations.judges import Judge, JudgedStream
from guardengine.labels import Verdict
from guardengine.terminal.llm import Upstream
from guardengine.terminal.printer import JudgedText, Printer, Token


class GuardedChat:
    """messages: the conversation so far. Turns that were blocked or failed are not in it, so that the next goes on from
    before them; of a reply that was cancelled it has what was shown."""

    def __init__(
        self, judge: Judge, upstream: Upstream, printer: Printer, tell: Callable[[str], None]
    ) -> None:
        """tell: called with what is to be said besides the reply."""
        self._judge, self._upstream, self._printer, self._tell = judge, upstream, printer, tell
        self.messages: list[dict[str, str]] = []

    def reset(self) -> None:
        self.messages = []

    async def turn(self, text: str) -> None:
        """Judge the user's text, have the LLM reply, and show what is cleared of that. Raises what the guard raises,
        and ServerError for the LLM's server; the turn has not happened then."""
        asked = [*self.messages, {"role": "user", "content": text}]
        stream = await self._judge.open(asked)
        try:
            if stream.verdict.action == "block":
                self._tell(
                    f"blocked: the prompt is {_why(stream.verdict)}; it was not sent to {self._upstream.model}"
                )
                return
            reply = JudgedText(self._printer)
            try:
                ahead = PullAhead(self._upstream.deltas(asked), MAX_AHEAD)
                async with aclosing(relay(ahead, _Reply(stream, reply))) as tokens:
                    async for token in tokens:
                        reply.show(token)
            except asyncio.CancelledError:
                self._keep(asked, reply.shown)
                raise
            finally:
                if reply.shown:
                    self._printer.end()
            verdict = stream.verdict
            if verdict.action == "block":
                self._tell(
                    f"blocked: the reply is {_why(verdict)}; it was stopped, and the turn is forgotten"
                )
                return
            self._keep(asked, reply.text)
            if not reply.text:
                self._tell(f"{self._upstream.model} said nothing")
        finally:
            await stream.close()

    def _keep(self, asked: list[dict[str, str]], text: str) -> None:
        if text:
            self.messages = [*asked, {"role": "assistant", "content": text}]


class _Reply:
    """The LLM's deltas on a judged stream, for `relay`; what comes out are tokens of the text."""

    def __init__(self, stream: JudgedStream, text: JudgedText) -> None:
        self._stream, self._text = stream, text

    @property
    def is_blocked(self) -> bool:
        return self._stream.verdict.action == "block"

    async def append(self, items: list[str]) -> None:
        text = "".join(items)
        self._text.add(text, await self._stream.append(text))

    async def finish(self) -> None:
        self._text.add("", await self._stream.finish())

    def take(self) -> list[Token]:
        return self._text.take(self._stream.cleared_chars)

    def rest(self) -> list[Token]:
        return self._text.rest()


def _why(verdict: Verdict) -> str:
    category = "" if verdict.category is None else f", {verdict.category}"
    return f"{verdict.risk}{category} (rule {verdict.rule})"
