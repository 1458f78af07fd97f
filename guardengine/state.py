"""StreamState: the books of one moderated conversation. No torch, no engine.

Three things drive everything: `num_tokens` were accepted, `num_computed_tokens` of them have their keys and
values in the cache, and `wanted` lists the positions whose label is still to come. A label is emitted when its
position is computed for the first time, and never again: recomputing a position finds nothing wanted there.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import NamedTuple

from guardengine.labels import Label, Role, Verdict
from guardengine.policy import Policy, PolicyState


class Wanted(NamedTuple):
    """A label to come: the heads of `role` at `position`."""

    position: int
    role: Role


class Turn(NamedTuple):
    """The content of one message, tokens start..end-1, in a stream whose template the engine feeds."""

    role: Role
    start: int
    end: int
    is_closed: bool  # content is complete: its <|im_end|> was fed


@dataclass(slots=True, eq=False)
class StreamState:
    """The books of one stream. Every list is in ascending order of position, so rollback is truncation."""

    stream_id: str
    policy: Policy
    policy_states: list[
        tuple[int, PolicyState]
    ]  # (position, state after the label there); the first is at -1
    turns: tuple[Turn, ...] | None = None  # None: opened from token ids, the caller feeds the template
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    wanted: list[Wanted] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)  # role "assistant"
    prompt_labels: list[Label] = field(default_factory=list)  # role "user"
    is_closed: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_pending_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def verdict(self) -> Verdict:
        return self.policy.verdict(self.policy_states[-1][1])

    def wanted_in(self, start: int, end: int) -> list[Wanted]:
        """The wanted labels at positions start..end-1."""
        first = bisect_left(self.wanted, start, key=_position)
        return self.wanted[first : bisect_left(self.wanted, end, lo=first, key=_position)]

    def advance(self, num_tokens: int, labels: list[Label]) -> None:
        """Count `num_tokens` more as computed and record the labels that were wanted there."""
        self.num_computed_tokens += num_tokens
        for label in labels:
            (self.labels if label.role == "assistant" else self.prompt_labels).append(label)
            state = self.policy.advance(self.policy_states[-1][1], label)
            self.policy_states.append((label.position, state))
        del self.wanted[: len(labels)]

    def truncate(self, num_tokens: int) -> None:
        """Forget everything from position `num_tokens` on, labels and the policy's memory of them included."""
        del self.token_ids[num_tokens:]
        self.num_computed_tokens = min(self.num_computed_tokens, num_tokens)
        for labels in (self.labels, self.prompt_labels):
            del labels[bisect_left(labels, num_tokens, key=lambda label: label.position) :]
        del self.policy_states[bisect_left(self.policy_states, num_tokens, key=lambda entry: entry[0]) :]
        del self.wanted[bisect_left(self.wanted, num_tokens, key=_position) :]

    def copy(self, stream_id: str) -> StreamState:
        """A branch with the same history, without a block table and with nothing computed."""
        return StreamState(
            stream_id=stream_id,
            policy=self.policy,
            policy_states=self.policy_states[:],
            turns=self.turns,
            token_ids=self.token_ids[:],
            wanted=self.wanted[:],
            labels=self.labels[:],
            prompt_labels=self.prompt_labels[:],
        )


def _position(wanted: Wanted) -> int:
    return wanted.position
