"""PullAhead: an iterator, async or not, pulled in a task of its own, some items ahead of who takes them."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

from guardengine.errors import ConfigError

MAX_AHEAD = 16
_END = object()


class PullAhead:
    """Pulls from `source` after `start`, at most `max_ahead` items ahead, and closes it when it ends, fails or `close`
    is called: all in one task, because generators may hold scopes that must be left where they were entered. A
    synchronous iterator is pulled in a thread."""

    def __init__(self, source: Any, max_ahead: int) -> None:
        """Raises ConfigError for what is no iterable."""
        self._is_async = hasattr(source, "__aiter__")
        if not self._is_async and not hasattr(source, "__iter__"):
            raise ConfigError(
                f"the source is {type(source).__name__}, which is no iterator, async or not"
                + ("; await it first" if inspect.isawaitable(source) else "")
            )
        self._source, self._max_ahead = source, max_ahead
        self._items: list[Any] = []
        self._error: BaseException | None = None
        self._is_done = self._is_closing = False
        self._has_more, self._has_room = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to pull; once is enough."""
        if self._task is None and not self._is_done:
            self._task = asyncio.create_task(self._pull())

    async def take(self) -> list[Any]:
        """The items that have come; waits for the first. [] at the end. Raises what the source raised, after its
        items."""
        while not self._items:
            if self._is_done:
                if self._error is not None:
                    raise self._error
                return []
            self._has_more.clear()
            await self._has_more.wait()
        items, self._items = self._items, []
        self._has_room.set()
        return items

    async def close(self) -> None:
        """Stop, and close the source; returns when that is done. Closing twice is fine. What the source raises while
        it is closed is raised by `take` only."""
        self._is_closing = True
        if self._task is None:
            if not self._is_done:
                self._is_done = True
                await self._close_all(self._source)
            return
        if not self._task.done():
            self._task.cancel()
        await asyncio.wait([self._task])

    async def _pull(self) -> None:
        iterator: Any = self._source
        try:
            iterator = aiter(self._source) if self._is_async else iter(self._source)
            if self._is_async:
                async for item in iterator:
                    await self._put(item)
            else:
                while (item := await _next_in_thread(iterator)) is not _END:
                    await self._put(item)
        except (Exception, asyncio.CancelledError) as error:
            self._error = None if self._is_closing else error
        finally:
            try:
                await self._close_all(iterator, self._source)
            except Exception as error:
                self._error = self._error or error
            self._is_done = True
            self._has_more.set()

    async def _put(self, item: Any) -> None:
        self._items.append(item)
        self._has_more.set()
        while len(self._items) >= self._max_ahead:
            self._has_room.clear()
            await self._has_room.wait()

    async def _close_all(self, *sources: Any) -> None:
        for source in dict.fromkeys(map(_Identity, sources)):
            close = getattr(source.value, "aclose", None) or getattr(source.value, "close", None)
            if callable(close):
                result = close() if self._is_async else await asyncio.to_thread(close)
                if inspect.isawaitable(result):
                    await result


class _Identity:
    """Compares what it holds by identity, for things that cannot be hashed."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


async def _next_in_thread(iterator: Any) -> Any:
    """A synchronous iterator's next item, or _END. When this is cancelled it first waits for the item that is being
    made: nobody can interrupt a thread, or close a generator that runs."""
    item = asyncio.ensure_future(asyncio.to_thread(next, iterator, _END))
    try:
        return await asyncio.shield(item)
    except asyncio.CancelledError:
        await asyncio.wait([item])
        raise
