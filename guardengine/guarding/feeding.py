"""AsyncReply and SyncReply: a reply and the stream that it is fed to, for the loop in relay.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from guardengine.engine.async_stream import AsyncStream
from guardengine.engine.stream import Stream, StreamView
from guardengine.guarding.deltas import Reply, Shape


class AsyncReply(Reply):
    """A reply on an AsyncStream.

    Args:
        stream: nobody else may append to it.
        shape: how to read deltas.
        num_behind: how many cleared tokens are not shown yet, the newest ones.
        end_turn: whether the reply's <|im_end|> is fed at its end, where there is one to feed.
        timeout_s: for each append.
    """

    def __init__(
        self,
        stream: AsyncStream,
        shape: Shape,
        num_behind: int = 0,
        *,
        end_turn: bool = True,
        timeout_s: float | None = None,
    ) -> None:
        super().__init__(stream, shape, num_behind)
        self.stream, self._end_turn, self._timeout_s = stream, end_turn, timeout_s

    @property
    def is_blocked(self) -> bool:
        return is_blocked(self.stream)

    async def append(self, items: list[Any]) -> None:
        await self._append(self.add(items))

    async def finish(self) -> None:
        await self._append(self.end())
        await finish_reply(self.stream, self._end_turn, self._timeout_s)

    async def _append(self, delta: str | list[int]) -> None:
        if isinstance(delta, str) and delta:
            await self.stream.append_text(delta, timeout_s=self._timeout_s)
        elif not isinstance(delta, str) and delta:
            await self.stream.append(delta, timeout_s=self._timeout_s)


class SyncReply(Reply):
    """A reply on an Engine's stream.

    Args:
        stream: nobody else may append to it.
        shape: how to read deltas.
        run: computes what was fed; it is called after every append.
        end_turn: whether the reply's <|im_end|> is fed at its end, where there is one to feed.
    """

    def __init__(
        self, stream: Stream, shape: Shape, run: Callable[[], Any], *, end_turn: bool = True
    ) -> None:
        super().__init__(stream, shape)
        self.stream, self._run, self._end_turn = stream, run, end_turn

    @property
    def is_blocked(self) -> bool:
        return is_blocked(self.stream)

    def append(self, items: list[Any]) -> None:
        self._append(self.add(items))
        self._run()

    def finish(self) -> None:
        self._append(self.end())
        if self._end_turn and self.stream.can_end_turn:
            self.stream.finish_text()
        elif self.stream.held_text:
            self.stream.finish_text(end_turn=False)
        self._run()

    def _append(self, delta: str | list[int]) -> None:
        if isinstance(delta, str) and delta:
            self.stream.append_text(delta)
        elif not isinstance(delta, str) and delta:
            self.stream.append(delta)


async def finish_reply(stream: AsyncStream, end_turn: bool, timeout_s: float | None) -> None:
    """Feed what is held back, and the reply's <|im_end|> where there is one to feed."""
    if end_turn and stream.can_end_turn:
        await stream.finish_text(timeout_s=timeout_s)
    elif stream.held_text:
        await stream.finish_text(end_turn=False, timeout_s=timeout_s)


def is_blocked(stream: StreamView) -> bool:
    """Whether the stream's policy blocks it by now."""
    return stream.verdict.action == "block"
