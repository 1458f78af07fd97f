"""Drain: the graceful end of a server. New work is refused, and running work may finish until a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from guardengine.server.refusals import Refusal


class Drain:
    """Counts running work, and refuses new work once the end has begun. For one event loop."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._deadline: float | None = None
        self._num_under_way = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._listeners: set[Callable[[], None]] = set()

    @property
    def has_begun(self) -> bool:
        return self._deadline is not None

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; the whole time while the end has not begun."""
        return self.timeout_s if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def begin(self) -> None:
        """Refuse new work from now on, and call the listeners. A second call does nothing."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self.timeout_s
            for tell in list(self._listeners):
                tell()

    def check(self) -> None:
        """Raise Refusal, 503, for new work once the end has begun."""
        if self.has_begun:
            raise Refusal(
                503,
                "the server is shutting down; retry elsewhere, or when it is back",
                "draining",
                type="server_error",
                retry_after_s=self.left_s,
            )

    @contextmanager
    def work(self) -> Iterator[None]:
        """Running work, which the end waits for."""
        self._num_under_way += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._num_under_way -= 1
            if not self._num_under_way:
                self._quiet.set()

    @contextmanager
    def listen(self, tell: Callable[[], None]) -> Iterator[None]:
        """Call `tell` when the end begins."""
        self._listeners.add(tell)
        try:
            yield
        finally:
            self._listeners.discard(tell)

    async def until_quiet(self) -> bool:
        """Wait until no work is running, at most until the deadline. Returns whether that came in time."""
        if self._quiet.is_set():
            return True
        try:
            await asyncio.wait_for(self._quiet.wait(), self.left_s)
        except TimeoutError:
            return False
        return True
