"""run_feeds(): moderate whole streams, as many at a time as there is room for. moderation(): what came of one."""

from __future__ import annotations

from collections.abc import Sequence

from guardengine.core.admission import Ticket
from guardengine.core.engine_core import EngineCore
from guardengine.core.feeds import Feed
from guardengine.core.state import StreamState
from guardengine.errors import Overloaded
from guardengine.labels import Moderation, Verdict
from guardengine.policy import Policy
from guardengine.text.spans import Span


def run_feeds(
    core: EngineCore,
    feeds: Sequence[Feed],
    policy: Policy,
    *,
    tenant: str = "",
    timeout_s: float | None = None,
) -> list[StreamState]:
    """Run whole streams; returns their books, closed, in order.

    timeout_s: seconds for each, from when there is room for it. Other streams advance in the same steps and their
    labels come with the next `step`. Raises StreamTooLong before anything runs, or Overloaded when not even one fits.
    """
    core.check_engine_open()
    for feed in feeds:
        core.check_length(len(feed.token_ids), is_new=True)
    done: list[StreamState] = []
    running: list[StreamState] = []
    ticket = Ticket(policy, tenant=tenant)
    try:
        for feed in feeds:
            while (state := open_feed(core, feed, ticket, timeout_s, must=not running)) is None:
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


def open_feed(
    core: EngineCore, feed: Feed, ticket: Ticket, timeout_s: float | None = None, *, must: bool
) -> StreamState | None:
    """A stream, or None where there is no room for it. Raises Overloaded then if it `must` be opened."""
    if not must and not _has_room(core, len(feed.token_ids), ticket.tenant):
        return None
    try:
        return core.open(feed, ticket, timeout_s)
    except Overloaded:  # also where there seemed to be room: idle streams share blocks with others
        if must:
            raise
        return None


def _has_room(core: EngineCore, num_tokens: int, tenant: str) -> bool:
    try:
        core.admission.check_place(tenant)
        core.admission.check_pending(tenant, num_tokens)
    except Overloaded:
        return False
    return core.residency.has_room(num_tokens)


def moderation(
    state: StreamState, policy: Policy, verdict: Verdict, spans: list[Span | None] | None = None
) -> Moderation:
    """What came of a whole conversation. The response is judged alone; where tokens went unjudged, the verdict on that
    stands for it.

    verdict: on all of it. spans: of the tokens at the stream's end, where they are wanted.
    """
    labels, prompt = state.labels[:], state.prompt_labels[-1] if state.prompt_labels else None
    response = policy.judge(labels) if labels else None
    is_idle = state.is_idle
    if spans is not None:
        first = state.num_tokens - len(spans)
        spans = [spans[label.position - first] for label in labels]
    return Moderation(
        prompt,
        response if is_idle else verdict,
        labels,
        verdict,
        spans,
        state.num_tokens,
        is_idle and prompt is not None,
    )
