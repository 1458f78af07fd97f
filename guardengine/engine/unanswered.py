"""report_unanswered(): what is known of an engine whose thread does not answer."""

from __future__ import annotations

import time
from typing import Any

from guardengine.core.health import describe, report
from guardengine.engine.engine_thread import EngineThread


def report_unanswered(thread: EngineThread, timeout_s: float) -> dict[str, Any]:
    """A health report without the thread's help: "failing" where it has ended, else "stalled".

    Args:
        thread: The engine's thread.
        timeout_s: Seconds for which it was waited for.
    """
    core = None if thread.engine is None else thread.engine.core
    if thread.error is not None:
        return report(core, "failing", f"the engine's thread has ended: {describe(thread.error)}")
    began = thread.step_began
    where = "is loading" if core is None else "is busy with calls"
    if began is not None:
        where = f"has been in a step for {time.monotonic() - began:.1f} s"
    return report(core, "stalled", f"no answer within timeout_s={timeout_s:g}: the engine's thread {where}")
