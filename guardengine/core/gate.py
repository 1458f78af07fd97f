"""Gate: one thread, one call at a time. What is behind it needs no locks."""

from __future__ import annotations

from threading import get_ident
from types import TracebackType

from guardengine.errors import WrongThread


class Gate:
    """Lets calls of one thread in, one after another: the thread that comes first owns what is behind it."""

    def __init__(self) -> None:
        self._owner: int | None = None
        self._is_inside = False

    def __enter__(self) -> None:
        caller = get_ident()
        if self._owner is None:
            self._owner = caller
        elif caller != self._owner:
            raise WrongThread(
                "the engine belongs to the thread that used it first, and this is another one; call it from there, or "
                "use AsyncEngine, which many tasks can share"
            )
        if self._is_inside:
            raise WrongThread(
                "the engine is in the middle of another call of this thread; make this call after that one returned"
            )
        self._is_inside = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_inside = False

    def hand_over(self) -> None:
        """The next thread that comes is the owner. For the owner to call, outside of any other call."""
        with self:
            self._owner = None
