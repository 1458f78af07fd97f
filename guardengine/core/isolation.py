"""step_apart(): a step that survives its batch. When the model fails on a batch, its streams run in ever smaller
groups, until those that fail alone are known; the others get their labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from guardengine.core.engine_core import EngineCore
from guardengine.core.health import Canary, describe
from guardengine.core.state import StreamState
from guardengine.errors import AuditError
from guardengine.labels import Label

logger = logging.getLogger("guardengine")


def step_apart(core: EngineCore, canary: Canary) -> tuple[list[Label], list[StreamState]]:
    """One step of `core`, tried twice; returns its labels and the streams that are given up.

    A stream is given up when its pending tokens fail without company, and so is a whole batch when the canary fails
    too: then no stream is to blame, and none can be helped. Their policies are told ("error") and they are parked:
    left out of all steps until more is appended. Raises what went wrong outside of a batch, and AuditError.
    """
    for _ in range(2):
        try:
            return core.step(), []
        except AuditError:  # no stream's fault
            raise
        except Exception as error:
            last_error = error
            if not core.pipeline.suspects:  # not the model: the books cannot be trusted any more
                raise
            logger.warning("a step of %d streams failed: %s", len(core.pipeline.suspects), describe(error))
    suspects = list(core.pipeline.suspects)
    labels: list[Label] = []
    culprits = suspects
    if len(suspects) > 1:
        checked = canary.run()
        if checked.is_skipped or checked.problem is None:
            labels, culprits = _bisect(core, suspects)
    for state in culprits:
        core.fail(state, "error")
        core.scheduler.park(state)
    if len(culprits) < len(suspects):  # the model works
        core.pipeline.last_error = None
    logger.error(
        "gave up the pending tokens of %d of %d streams (%s)",
        len(culprits),
        len(suspects),
        ", ".join(state.stream_id for state in culprits[:8]),
        exc_info=last_error,
    )
    return labels, culprits


def _bisect(core: EngineCore, suspects: Sequence[StreamState]) -> tuple[list[Label], list[StreamState]]:
    """Run streams that failed together, and return the labels and those that fail alone."""
    labels: list[Label] = []
    culprits: list[StreamState] = []
    groups = [suspects]  # each failed as a whole
    while groups:
        group = groups.pop()
        if len(group) == 1:
            culprits += group
            continue
        middle = len(group) // 2
        for half in (group[:middle], group[middle:]):
            half = [state for state in half if state.num_unscheduled_tokens and not state.is_closed]
            if not half:
                continue
            try:
                labels += _step_only(core, half)
            except AuditError:
                raise
            except Exception:
                groups.append(half)
    return labels, [state for state in culprits if not state.is_closed]


def _step_only(core: EngineCore, states: Sequence[StreamState]) -> list[Label]:
    """Steps of these streams alone, until none is in flight."""
    with core.scheduler.only(states):
        labels = core.step()
        while len(core.pipeline):
            labels += core.step()
    return labels
