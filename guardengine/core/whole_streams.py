"""run_feeds(): moderate whole streams, as many at a time as there is room for. moderation(): what came of one."""

from __future__ import annotations

from collections.abc import Sequence

from guardengine.core.admission import Ticket
from guardengine.core.engine_core import EngineCore
from guardengine.core.feeds import Feed
from guardengine.core.state import StreamState
from guardengine.errors import Overloaded
from guardengine.labels import Moderation
from guardengine.policy import Policy


def run_feeds(core: EngineCore, feeds: Sequence[Feed], policy: Policy) -> list[StreamState]:
    """Run whole streams; returns their books, closed, in order.

    Other streams advance in the same steps and their labels come with the next `step`. Raises StreamTooLong before
    anything runs, or Overloaded when not even one fits.
    """
    core.check_engine_open()
    for feed in feeds:
        core.check_length(len(feed.token_ids), is_new=True)
    done: list[StreamState] = []
    running: list[StreamState] = []
    try:
        for feed in feeds:
            while (state := open_feed(core, feed, policy, must=not running)) is None:
                # First in, first done: the oldest is waited for, the others advance in the same steps.
                while running[0].num_pending_tokens:
                    core.step_for(running)
                core.close_stream(running[0])
                done.append(running.pop(0))
            running.append(state)
        core.run_until_computed(running)
    finally:
        for state in running:
            core.close_stream(state)
    return done + running


def open_feed(core: EngineCore, feed: Feed, policy: Policy, *, must: bool) -> StreamState | None:
    """A stream, or None where there is no room for it. Raises Overloaded then if it `must` be opened."""
    if not must and not _has_room(core, len(feed.token_ids)):
        return None
    try:
        return core.open(feed, Ticket(policy))
    except Overloaded:  # also where there seemed to be room: idle streams share blocks with others
        if must:
            raise
        return None


def _has_room(core: EngineCore, num_tokens: int) -> bool:
    try:
        core.admission.check_place("")
        core.admission.check_pending("", num_tokens)
    except Overloaded:
        return False
    return core.residency.has_room(num_tokens)


def moderation(state: StreamState, policy: Policy) -> Moderation:
    """What came of a whole conversation. The response is judged alone; where the model has failed, the verdict on that
    failure stands for it."""
    response = policy.judge(state.labels) if state.labels else None
    return Moderation(
        prompt=state.prompt_labels[-1] if state.prompt_labels else None,
        response=response if state.is_idle else state.verdict,
        labels=state.labels,
    )
