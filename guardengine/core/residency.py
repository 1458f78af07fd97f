"""Residency: whose keys and values are in the KV cache. Joins the block pool, the prefix cache and the idle streams.

Memory is found in this order: free blocks; cached blocks that nobody holds, least recently used first; blocks of
idle streams, least recently active first, which keep their ids and labels and are computed again when they go
on. What none of these can give is refused.

IdleStreams: streams with nothing to do, least recently active first. They are the first to lose their KV blocks, and
those that nobody comes back to can be closed.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from guardengine.core.block_pool import BlockPool
from guardengine.core.state import StreamState
from guardengine.errors import IntegrityError, Overloaded, StreamTooLong
from guardengine.labels import Label


class IdleStreams:
    """Idle streams in the order in which they went idle."""

    def __init__(self) -> None:
        self._since: OrderedDict[str, tuple[StreamState, float]] = OrderedDict()
        self._resident: OrderedDict[str, StreamState] = OrderedDict()  # those that hold blocks

    def __len__(self) -> int:
        return len(self._since)

    def __contains__(self, state: StreamState) -> bool:
        return state.stream_id in self._since

    def add(self, state: StreamState, now: float) -> None:
        """The stream has gone idle, or was active just now and is idle again."""
        self.discard(state)
        self._since[state.stream_id] = (state, now)
        if state.block_table:
            self._resident[state.stream_id] = state

    def discard(self, state: StreamState) -> None:
        """The stream has something to do, or is gone."""
        self._since.pop(state.stream_id, None)
        self._resident.pop(state.stream_id, None)

    def num_blocks(self) -> int:
        """At most so many blocks would be freed by all of them; fewer where blocks are shared."""
        return sum(len(state.block_table) for state in self._resident.values())

    def pop_resident(self) -> StreamState | None:
        """The least recently active one that holds blocks; it counts as holding none from now on."""
        return self._resident.popitem(last=False)[1] if self._resident else None

    def longest(self, before: float) -> StreamState | None:
        """The stream that has been idle for longest, if that was before the time `before`."""
        if not self._since:
            return None
        state, since = next(iter(self._since.values()))
        return state if since < before else None

    def check_integrity(self, states: Iterable[StreamState]) -> None:
        """Raise IntegrityError unless exactly the idle ones of the open streams are here."""
        idle = {state.stream_id for state in states if state.is_idle}
        if idle != self._since.keys():
            raise IntegrityError(f"idle on the books: {sorted(self._since)}; in fact: {sorted(idle)}")
        holding = {name for name, (state, _) in self._since.items() if state.block_table}
        if holding != self._resident.keys():
            raise IntegrityError(f"idle with blocks: {sorted(self._resident)}; in fact: {sorted(holding)}")


class PrefixHit(NamedTuple):
    """A stream's first tokens, found in the prefix cache, with the labels that are wanted there."""

    state: StreamState
    num_tokens: int
    labels: list[Label]

    def for_branch(self, branch: StreamState) -> PrefixHit:
        """This hit as a branch of the stream has it: with its labels under the branch's name."""
        labels = [replace(label, stream_id=branch.stream_id) for label in self.labels]
        return PrefixHit(branch, self.num_tokens, labels)

    def cut(self, num_tokens: int) -> PrefixHit:
        """What is left when the stream is cut to `num_tokens` tokens."""
        labels = [label for label in self.labels if label.position < num_tokens]
        return PrefixHit(self.state, min(self.num_tokens, num_tokens), labels)


class Residency:
    """Gives streams their KV blocks and takes them back. `copy_block(source, destination)` copies contents."""

    def __init__(self, pool: BlockPool, reserve_blocks: int, copy_block: Callable[[int, int], None]) -> None:
        self.pool = pool
        self.idle = IdleStreams()
        self.hits: dict[str, PrefixHit] = {}  # by stream: they count as computed with the next step
        self.num_preempted = 0
        self._reserve_blocks = reserve_blocks
        self._copy_block = copy_block

    def allocate(self, state: StreamState, *, is_new: bool = False) -> None:
        """Give the stream blocks for all of its tokens: shared ones where the prefix cache knows its beginning.

        The tokens in shared blocks count as scheduled, and are in `hits` until the next step.

        Args:
            state: the books of the stream, whose `token_ids` are complete already.
            is_new: the stream is not open yet, so it leaves the reserve (`kv_reserve`) to those that are.

        Raises:
            Overloaded: there is no room; nothing has changed.
        """
        pool, cache = self.pool, self.pool.cache
        if pool.has_room(state):  # of most appends: a few tokens in the last block
            return
        labels: list[Label] = []
        may_hit = cache is not None and not state.block_table
        if cache is not None and may_hit:
            hit = cache.match(state)
            labels = hit.labels
            pool.share(hit.blocks)
            state.block_table = array("i", hit.blocks)
            state.num_scheduled_tokens = len(hit.blocks) * pool.block_size
        try:
            self._make_room(state, self._reserve_blocks if is_new else 0)
            pool.grow(state, state.num_tokens, self._copy_block)
        except BaseException:
            if may_hit:
                pool.shrink(state, 0)
                state.drop_blocks()
            raise
        if may_hit and state.num_scheduled_tokens:
            found = PrefixHit(state, state.num_scheduled_tokens, labels)
            self.hits[state.stream_id] = found.for_branch(state)  # the labels came from another stream

    def share(self, branch: StreamState, parent: StreamState) -> None:
        """Let a new branch have the blocks that its parent has filled, and what the prefix cache had of it."""
        branch.block_table = parent.block_table[: self.pool.blocks_for(parent.num_scheduled_tokens)]
        branch.num_computed_tokens = parent.num_computed_tokens
        branch.num_scheduled_tokens = parent.num_scheduled_tokens
        self.pool.share(branch.block_table)
        if hit := self.hits.get(parent.stream_id):
            self.hits[branch.stream_id] = hit.for_branch(branch)

    def pop_hits(self) -> list[PrefixHit]:
        """What was found in the prefix cache since the last step, to be counted as computed now."""
        if not self.hits:
            return []
        hits = list(self.hits.values())
        self.hits.clear()
        return hits

    def cut(self, state: StreamState, num_tokens: int) -> None:
        """The stream has lost its tokens from position `num_tokens` on: take the blocks that only those needed."""
        if hit := self.hits.pop(state.stream_id, None):
            hit = hit.cut(num_tokens)
            if state.is_idle:  # it was preempted, and no label of what is left is to come
                state.advance(hit.num_tokens, [])
            else:
                self.hits[state.stream_id] = hit
        self.pool.shrink(state, num_tokens)

    def leave(self, state: StreamState) -> None:
        """The stream was closed, or is not let in: take all of its blocks."""
        self.hits.pop(state.stream_id, None)
        self.idle.discard(state)
        self.pool.shrink(state, 0)

    def has_room(self, num_tokens: int) -> bool:
        """Whether a new stream of `num_tokens` tokens would be given blocks."""
        needed = self.pool.blocks_for(num_tokens) + self._reserve_blocks
        return self.pool.num_free >= needed or self.pool.num_free + self.idle.num_blocks() >= needed

    def check_length(self, num_tokens: int, max_model_len: int, *, is_new: bool = False) -> None:
        """Raise StreamTooLong for a stream of `num_tokens` tokens that could never be computed."""
        num_blocks = self.pool.num_blocks - (self._reserve_blocks if is_new else 0)
        limit = min(max_model_len, num_blocks * self.pool.block_size)
        if num_tokens > limit:
            reason = (
                f"max_model_len={limit}"
                if limit == max_model_len
                else f"the {limit} tokens of the whole KV cache (raise kv_cache_bytes)"
            )
            raise StreamTooLong(
                f"a stream of {num_tokens} tokens exceeds {reason}; shorten the conversation or open a new stream"
            )

    def publish(self, state: StreamState, num_computed_before: int) -> None:
        """Make the blocks known that were filled since `num_computed_before` tokens were computed."""
        size = self.pool.block_size
        first, end = num_computed_before // size, state.num_computed_tokens // size
        if self.pool.cache is not None and end > first:
            self.pool.cache.publish(state, first, end)

    def release(self, state: StreamState) -> None:
        """Take all blocks of a stream; those that the prefix cache knows stay there until they are needed."""
        self.pool.shrink(state, 0)
        state.drop_blocks()

    def _make_room(self, state: StreamState, reserve: int) -> None:
        pool = self.pool
        needed = pool.blocks_to_grow(state, state.num_tokens)
        if pool.num_free >= needed + reserve:
            return
        num_idle = self.idle.num_blocks()
        if pool.num_free + num_idle < needed + reserve:
            kept = f", {reserve} of them kept for open streams (kv_reserve)" if reserve else ""
            raise Overloaded(
                f"{needed} KV cache blocks of {pool.block_size} tokens are needed and {pool.num_free} of "
                f"{pool.num_blocks} are free, {num_idle} more held by idle streams{kept}; close streams or raise "
                "kv_cache_bytes"
            )
        while pool.num_free < needed:
            victim = self.idle.pop_resident()
            if victim is None:  # their blocks were shared with streams that are not idle
                break  # `grow` refuses
            self.release(victim)
            self.num_preempted += 1
