"""collect_rarely(): for processes whose main job is an engine."""

from __future__ import annotations

import gc

_THRESHOLDS = (10_000, 20, 50)  # a full collection after ten million objects more than were freed


def collect_rarely() -> None:
    """Let the garbage collector of this process look at what is made from now on only, and seldom.

    Call it once engines are loaded. What loading has made stays: looking through it again and again takes a hundred
    milliseconds and more, in which nothing else runs. Labels and streams, of which a full collection looks through as
    many as there are, hold nothing that only the collector can free; of a server's connections asyncio's closed
    transports do, some 3 KB each.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
