"""run_feeds(): moderate whole streams, as many at a time as there is room for. moderation(): what came of one."""

from __future__ import annotations

from collections.abc import Sequence

from guardengine.admission import Ticket
from guardengine.conversation import Feed
from guardengine.core import EngineCore
from guardengine.errors import Overloaded
from guardengine.labels import Moderation
from guardengine.policy import Policy
from guardengine.state import StreamState


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
            while running and not has_room(core, len(feed.token_ids)):
                # First in, first done: the oldest is waited for, the others advance in the same steps.
                while running[0].num_pending_tokens:
                    core.step_for(running)
                core.close_stream(running[0])
                done.append(running.pop(0))
            running.append(core.open(feed, Ticket(policy)))
        core.run_until_computed(running)
    finally:
        for state in running:
            core.close_stream(state)
    return done + running


def has_room(core: EngineCore, num_tokens: int) -> bool:
    """Whether a new stream of `num_tokens` tokens would be let in."""
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
