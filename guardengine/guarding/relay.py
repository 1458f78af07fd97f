"""The loop between an LLM and its reader: pull, append, show what is cleared, stop on a block.

It is written once, in `_steps`, which does no I/O: it hands out what there is to wait for, and what may be shown.
`relay` awaits the one and yields the other; `relay_sync` is the loop of calls that have done their work on return.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeVar

from guardengine.guarding.pull_ahead import PullAhead

_END = object()
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Judged(Protocol[T_co]):
    """A reply with the guard that judges it. What `append` and `finish` return is awaited by `relay`."""

    @property
    def is_blocked(self) -> bool: ...

    def append(self, items: list[Any]) -> Any:
        """Judge some of the LLM's items, and hold them."""

    def finish(self) -> Any:
        """Judge what the guard holds back, and the reply's end."""

    def take(self) -> Iterable[T_co]:
        """What is cleared by now and was not taken."""

    def rest(self) -> Iterable[T_co]:
        """All that was not taken."""


class _Shown(NamedTuple):
    items: Iterable[Any]


def _steps(pull: Callable[[], Any], reply: Judged[Any]) -> Generator[Any, Any, None]:
    """pull: the items that have come, [] at the end. What is yielded and is no _Shown is waited for; its result is to
    be sent back."""
    while items := (yield pull()):
        yield reply.append(items)
        # Asked before anything is shown: nobody knows how long the reader takes.
        has_blocked = reply.is_blocked
        yield _Shown(reply.take())
        if has_blocked:
            return
    yield reply.finish()
    yield _Shown(reply.take() if reply.is_blocked else reply.rest())


async def relay(ahead: PullAhead, reply: Judged[T]) -> AsyncGenerator[T, None]:
    """Judge an LLM's items as they come, and yield what is cleared.

    Args:
        ahead: the LLM. It is closed at the end, on a block, on an error, and when this generator is closed.
        reply: its `append` and `finish` are coroutines.

    Yields:
        What `reply.take` gives, and at the end of a reply that is not blocked what `reply.rest` gives.

    Raises:
        GuardEngineError: what the reply's methods raise, and whatever the LLM's iterator raises.
    """
    steps, result = _steps(ahead.take, reply), None
    try:
        ahead.start()
        while (step := _next_step(steps, result)) is not _END:
            if isinstance(step, _Shown):
                for item in step.items:
                    yield item
            else:
                result = await step
    finally:
        await ahead.close()


def relay_sync(source: Iterable[Any], reply: Judged[T]) -> Generator[T, None, None]:
    """`relay` where nothing is waited for, of one item after the other. Whoever made the source closes it."""
    iterator = iter(source)
    steps, result = _steps(lambda: list(islice(iterator, 1)), reply), None
    while (step := _next_step(steps, result)) is not _END:
        if isinstance(step, _Shown):
            yield from step.items
        else:
            result = step


def _next_step(steps: Generator[Any, Any, None], result: Any) -> Any:
    try:
        return steps.send(result)
    except StopIteration:
        return _END
