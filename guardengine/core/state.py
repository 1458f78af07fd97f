"""StreamState: the books of one moderated conversation. No torch, no engine.

Four counters drive everything, and none of them is a phase:

    num_tokens             were accepted
    num_scheduled_tokens   of them were given to a step, done or in flight
    num_computed_tokens    of them have their keys and values in the cache
    num_seen_tokens        of them were computed at least once, so their labels are out

`wanted` lists the positions whose label is still to come. A label is emitted when its position is computed for
the first time, and never again: recomputing a position, after its keys and values were dropped, finds nothing
wanted there. A stream is idle when it has seen all of its tokens, whether the cache still holds them or not.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from guardengine.labels import Label, Role, Verdict
from guardengine.policy import Failure, Policy, PolicyState
from guardengine.text.spans import TextState

# Which heads read a position: the guard heads of a role, or a language model's ("answer").
Reader: TypeAlias = Role | Literal["answer"]


class Wanted(NamedTuple):
    """A label to come: the heads of `role` at `position`."""

    position: int
    role: Reader


class Hidden(NamedTuple):
    """What stands for a label where a language model's head reads it: the row that this head is multiplied with."""

    stream_id: str
    role: Reader
    position: int
    row: npt.NDArray[np.float32]  # [E], final norm's output


class Failed(NamedTuple):
    """Tokens that went unjudged: after the label at `position` (-1: before any), the stream's assistant tokens being
    `num_tokens` by then."""

    position: int
    failure: Failure
    num_tokens: int


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
    # (position, the policy's state after the label there); the first is at -1.
    policy_states: list[tuple[int, PolicyState]]
    turns: tuple[Turn, ...] | None = None  # None: opened from token ids, the caller feeds the template
    tenant: str = ""
    priority: int = 0  # higher runs sooner
    salt: bytes = b""  # streams with the same one share cached blocks
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    num_scheduled_tokens: int = 0
    num_computed_tokens: int = 0
    num_seen_tokens: int = 0
    block_table: array[int] = field(default_factory=lambda: array("i"))  # copied whole into every batch
    block_digests: list[bytes] = field(default_factory=list)  # of full blocks, as far as they were needed
    wanted: list[Wanted] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)  # role "assistant"
    prompt_labels: list[Label] = field(default_factory=list)  # role "user"
    hidden: list[Hidden] = field(default_factory=list)  # role "answer", until it is read
    failures: list[Failed] = field(default_factory=list)
    text: TextState | None = None  # since the first append_text
    is_closed: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_idle(self) -> bool:
        """Nothing to do until more is appended."""
        return self.num_seen_tokens == len(self.token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens to compute, those of dropped blocks included."""
        num_tokens = len(self.token_ids)
        return 0 if self.num_seen_tokens == num_tokens else num_tokens - self.num_computed_tokens

    @property
    def num_unscheduled_tokens(self) -> int:
        """Pending tokens that no step has been given yet."""
        num_tokens = len(self.token_ids)
        return 0 if self.num_seen_tokens == num_tokens else num_tokens - self.num_scheduled_tokens

    @property
    def num_assistant_tokens(self) -> int:
        """Tokens that have an assistant's label, or will."""
        return len(self.labels) + sum(wanted.role == "assistant" for wanted in self.wanted[:])

    @property
    def verdict(self) -> Verdict:
        return self.policy.verdict(self.policy_states[-1][1])

    def wanted_in(self, start: int, end: int) -> list[Wanted]:
        """The wanted labels at positions start..end-1."""
        wanted = self.wanted
        # The usual case: all of them, of what was just appended.
        if wanted and start <= wanted[0].position and wanted[-1].position < end:
            return wanted[:]
        first = bisect_left(self.wanted, start, key=_position)
        return self.wanted[first : bisect_left(self.wanted, end, lo=first, key=_position)]

    def labels_between(self, start: int, end: int) -> list[Label]:
        """The labels so far at positions start..end-1, of both roles."""
        found: list[Label] = []
        for labels in (self.prompt_labels, self.labels):
            first = bisect_left(labels, start, key=_position_of_label)
            found += labels[first : bisect_left(labels, end, lo=first, key=_position_of_label)]
        return found

    def advance(self, num_tokens: int, labels: Sequence[Label | Hidden]) -> None:
        """Count `num_tokens` more as computed and record the labels that were wanted there."""
        self.num_computed_tokens += num_tokens
        self.num_scheduled_tokens = max(self.num_scheduled_tokens, self.num_computed_tokens)
        self.num_seen_tokens = max(self.num_seen_tokens, self.num_computed_tokens)
        for label in labels:
            self.record(label)
        del self.wanted[: len(labels)]

    def record(self, label: Label | Hidden) -> None:
        """Keep a label, and what the policy makes of it."""
        if isinstance(label, Hidden):
            self.hidden.append(label)
            return
        (self.labels if label.role == "assistant" else self.prompt_labels).append(label)
        policy_state = self.policy.advance(self.policy_states[-1][1], label)
        self.policy_states.append((label.position, policy_state))

    def fail(self, failure: Failure) -> None:
        """Record that accepted tokens went unjudged; what that means is the policy's choice."""
        self.record_failure(Failed(self.policy_states[-1][0], failure, self.num_assistant_tokens))

    def record_failure(self, failed: Failed) -> None:
        """Keep a failure, and what the policy makes of it."""
        position, failure, num_tokens = failed
        policy_state = self.policy.fail(self.policy_states[-1][1], failure, num_tokens)
        self.policy_states.append((position, policy_state))
        self.failures.append(failed)

    def drop_blocks(self) -> None:
        """Forget that anything is in the cache; ids, labels and what was seen stay."""
        self.num_computed_tokens = self.num_scheduled_tokens = 0

    def truncate(self, num_tokens: int, block_size: int) -> None:
        """Forget everything from position `num_tokens` on, labels and the policy's memory of them included."""
        del self.token_ids[num_tokens:]
        self.num_computed_tokens = min(self.num_computed_tokens, num_tokens)
        self.num_scheduled_tokens = min(self.num_scheduled_tokens, num_tokens)
        self.num_seen_tokens = min(self.num_seen_tokens, num_tokens)
        del self.block_digests[num_tokens // block_size :]
        del self.failures[bisect_left(self.failures, num_tokens, key=lambda failed: failed.position) :]
        for labels in (self.labels, self.prompt_labels, self.hidden):
            del labels[bisect_left(labels, num_tokens, key=_position_of_label) :]
        del self.policy_states[bisect_left(self.policy_states, num_tokens, key=lambda entry: entry[0]) :]
        del self.wanted[bisect_left(self.wanted, num_tokens, key=_position) :]
        if self.text is not None:
            self.text = self.text.truncated(num_tokens)
        # A failure that was let pass cleared tokens before they were computed: not those that come in their place.
        position, policy_state = self.policy_states[-1]
        cleared = min(policy_state.cleared, self.num_assistant_tokens)
        self.policy_states[-1] = (position, policy_state._replace(cleared=cleared))

    def copy(self, stream_id: str) -> StreamState:
        """A branch with the same history, without a block table and with nothing computed."""
        return StreamState(
            stream_id=stream_id,
            policy=self.policy,
            policy_states=self.policy_states[:],
            turns=self.turns,
            tenant=self.tenant,
            priority=self.priority,
            salt=self.salt,
            token_ids=self.token_ids[:],
            num_seen_tokens=self.num_seen_tokens,
            block_digests=self.block_digests[:],
            wanted=self.wanted[:],
            labels=self.labels[:],
            prompt_labels=self.prompt_labels[:],
            hidden=self.hidden[:],
            failures=self.failures[:],
            text=self.text and self.text.copy(),
        )


def _position(wanted: Wanted) -> int:
    return wanted.position


def _position_of_label(label: Label | Hidden) -> int:
    return label.position
