"""in_loop(): asynchronous calls from code that is not, in an event loop of this module's own."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def in_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in the loop of synchronous calls, from any thread, one with a loop of its own included. The loop
    goes on between calls, so that connections stay open.

    Args:
        coroutine: what to run.

    Returns:
        What the coroutine returns.

    Raises:
        BaseException: whatever it raises.
    """
    result = asyncio.run_coroutine_threadsafe(coroutine, _loop())
    try:
        return result.result()
    except BaseException:
        # Of the caller, such as Ctrl-C: nobody waits for the coroutine any longer.
        result.cancel()
        raise


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    run: Callable[[], None] = loop.run_forever
    threading.Thread(target=run, name="guardengine-sync-calls", daemon=True).start()
    return loop
