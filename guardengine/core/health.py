"""Health: whether the model still computes, asked of the model itself.

The canary is one token, run through the whole model in a KV block that nobody holds. Not a flag that says that the
last step went well: an idle engine, or one whose memory has gone bad, would keep saying so.
"""

from __future__ import annotations

import time
from typing import Any, Literal, NamedTuple

import numpy as np

from guardengine.core.engine_core import EngineCore
from guardengine.core.layout import build_batch
from guardengine.core.scheduler import Chunk
from guardengine.core.state import StreamState, Wanted
from guardengine.policy import Policy

Status = Literal["ok", "failing", "stalled"]


class Checked(NamedTuple):
    """What a canary came to. `problem` is None when there was none; `took_ms` when it did not run to its end."""

    problem: str | None
    took_ms: float | None
    is_skipped: bool = False


class Canary:
    """One token through the model, the same every time. For the engine's thread."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._first: bytes | None = None  # the logits of the first that ran

    def run(self) -> Checked:
        """Run it after the steps in flight. Nothing is raised, and no stream, label or held block is touched."""
        core = self._core
        core.land()
        if not core.pool.num_free:
            return Checked("no KV block is free for the canary", None, is_skipped=True)
        policy = Policy.strict()
        canary = StreamState("canary", policy, [(-1, policy.start())], wanted=[Wanted(0, "assistant")])
        canary.token_ids.append(0)
        began = time.perf_counter()
        core.pool.grow(canary, 1, core.runner.copy_block)
        try:
            batch, _ = build_batch([Chunk(canary, 0, 1)], core.pool.block_size)
            logits = core.runner.launch(batch).wait().logits
        except Exception as error:
            return Checked(f"the canary failed: {describe(error)}", None)
        finally:
            core.pool.shrink(canary, 0)
        return Checked(self._problem(logits), 1e3 * (time.perf_counter() - began))

    def _problem(self, logits: np.ndarray[Any, np.dtype[np.float32]]) -> str | None:
        if not np.isfinite(logits).all():
            return "the canary's logits are not finite: the weights or the memory they are in are broken"
        if self._core.runner.info.isa is None:  # plain PyTorch: the same bits are not promised
            return None
        found = logits.tobytes()
        if self._first is None:
            self._first = found
        if found != self._first:
            return "the canary's logits are not those of the first one: the weights in memory have changed"
        return None


def check_health(core: EngineCore, canary: Canary, timeout_s: float | None = None) -> dict[str, Any]:
    """Run the canary and report; "stalled" when it took longer than `timeout_s`. See Engine.health."""
    checked = canary.run()
    if checked.is_skipped:
        status: Status = "ok" if core.pipeline.last_error is None else "failing"
    elif checked.problem:
        status = "failing"
    elif timeout_s is not None and checked.took_ms is not None and checked.took_ms > 1e3 * timeout_s:
        return report(
            core, "stalled", f"the canary took longer than timeout_s={timeout_s:g}", checked.took_ms
        )
    else:
        status = "ok"
    return report(core, status, checked.problem, checked.took_ms)


def report(
    core: EngineCore | None, status: Status, note: str | None, canary_ms: float | None = None
) -> dict[str, Any]:
    """What is known without running anything, as a plain dict. May be called from any thread."""
    last_error = last_end = None
    if core is not None:
        last_error, last_end = core.pipeline.last_error, core.pipeline.last_end
    return {
        "status": status,
        "note": note,
        "canary_ms": canary_ms,
        "last_error": None if last_error is None else describe(last_error),
        "last_step_age_s": None if core is None or last_end is None else core.clock() - last_end,
    }


def describe(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}"
