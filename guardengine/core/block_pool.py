"""BlockPool: who holds which block of the KV cache. Counts references and nothing else; no torch, no labels.

A pending stream's block table covers its tokens exactly:

    tokens   | 0 .. S-1 | S .. 2S-1 | 2S .. n-1    |
    table    |    7     |     2     |     9        |      ceil(n / S) blocks
             |   computed: shareable   | pending: this stream's alone

Blocks are taken when tokens are accepted, not when they are computed, so a stream that was let in can always
run. A block may be shared, by forks or through the prefix cache, only as far as its tokens are computed; `grow`
gives a stream a block of its own before it writes into one that others can still read.

Every block is in one of three states: held by streams; cached, which is held by nobody but known to the prefix
cache; or free. Cached blocks are taken, least recently used first, when there are no free ones.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

from guardengine.core.prefix_cache import PrefixCache
from guardengine.core.state import StreamState
from guardengine.errors import IntegrityError, Overloaded


class BlockPool:
    """`num_blocks` KV cache blocks of `block_size` tokens. Without a `cache` nothing outlives its holders."""

    def __init__(self, num_blocks: int, block_size: int, cache: PrefixCache | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.cache = cache
        self.num_evicted = 0  # cached blocks that were taken for other tokens
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the last freed is the first reused
        self._cached: OrderedDict[int, None] = OrderedDict()  # held by nobody, least recently used first
        self._num_holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be taken, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that the prefix cache knows."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def has_room(self, state: StreamState) -> bool:
        """Whether the stream's own blocks have room for all of its tokens, so that `grow` has nothing to do."""
        table = state.block_table
        if not table or len(state.token_ids) > len(table) * self.block_size:
            return False
        block = table[min(state.num_scheduled_tokens // self.block_size, len(table) - 1)]
        return self._num_holders[block] == 1 and (self.cache is None or block not in self.cache)

    def blocks_to_grow(self, state: StreamState, num_tokens: int) -> int:
        """Blocks that `grow` will take."""
        return self.blocks_for(num_tokens) - len(state.block_table) + self._writes_shared(state)

    def grow(self, state: StreamState, num_tokens: int, copy_block: Callable[[int, int], None]) -> None:
        """Extend the stream's block table to `num_tokens` tokens, all of its uncomputed ones in its own blocks.

        When the block that the stream will write next is shared, it gets its own one with the same contents:
        `copy_block(source, destination)`. Raises Overloaded, with nothing changed, when too few blocks are free;
        nothing is changed either when the copy fails.
        """
        table = state.block_table
        writes_shared = self._writes_shared(state)
        num_missing = self.blocks_for(num_tokens) - len(table)
        if (needed := num_missing + writes_shared) > self.num_free:
            raise Overloaded(
                f"{needed} KV cache blocks of {self.block_size} tokens are needed and "
                f"{self.num_free} of {self.num_blocks} are free; close streams or raise kv_cache_bytes"
            )
        first_written = state.num_scheduled_tokens // self.block_size
        if writes_shared:
            source, destination = table[first_written], self._pop_block()
            try:
                copy_block(source, destination)
            except BaseException:
                self._release(destination)
                raise
            table[first_written] = destination
            self._release(source)
        elif self.cache is not None and first_written < len(table):
            self.cache.forget(table[first_written])  # about to be written by its only holder
        if num_missing > 0:
            table.extend(self._pop_block() for _ in range(num_missing))

    def share(self, table: Iterable[int]) -> None:
        """Add one holder to each block, which others hold or the prefix cache knows."""
        for block in table:
            if not self._num_holders[block]:
                del self._cached[block]
            self._num_holders[block] += 1

    def shrink(self, state: StreamState, num_tokens: int) -> None:
        """Give back the blocks past `num_tokens` tokens; tails first, so that they are reused first."""
        table = state.block_table
        for _ in range(len(table) - self.blocks_for(num_tokens)):
            self._release(table.pop())

    def _writes_shared(self, state: StreamState) -> bool:
        first_written = state.num_scheduled_tokens // self.block_size
        table = state.block_table
        return first_written < len(table) and self._num_holders[table[first_written]] > 1

    def _pop_block(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self.num_evicted += 1
            if self.cache is not None:
                self.cache.forget(block)
        self._num_holders[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._num_holders[block] -= 1
        if self._num_holders[block]:
            return
        if self.cache is not None and block in self.cache:
            self._cached[block] = None
        else:
            self._free.append(block)

    # -- the books -----------------------------------------------------------------------------------------

    def check_integrity(self, states: Iterable[StreamState]) -> None:
        """Raise IntegrityError unless the books agree with the open streams' block tables."""
        holders: Counter[int] = Counter()
        for state in states:
            holders.update(state.block_table)
            self._check_table(state)
        for block, num_holders in enumerate(self._num_holders):
            if num_holders != holders[block]:
                raise IntegrityError(
                    f"block {block}: {num_holders} holders on the books, {holders[block]} in the tables"
                )
        unheld = [block for block, n in enumerate(self._num_holders) if n == 0]
        if sorted([*self._free, *self._cached]) != unheld:
            raise IntegrityError(
                f"the free list {sorted(self._free)[:8]}... and the cached blocks {sorted(self._cached)[:8]}... are "
                "not the unheld blocks"
            )
        for block in self._cached:
            if self.cache is None or block not in self.cache:
                raise IntegrityError(f"block {block} is kept for the prefix cache, which does not know it")
        for block in self._free:
            if self.cache is not None and block in self.cache:
                raise IntegrityError(f"block {block} is free and known to the prefix cache")

    def _check_table(self, state: StreamState) -> None:
        name, table = state.stream_id, state.block_table
        num_computed, num_scheduled = state.num_computed_tokens, state.num_scheduled_tokens
        if len(set(table)) != len(table):
            raise IntegrityError(f"{name}: a block appears twice in its table {table.tolist()}")
        if table and not 0 <= min(table) <= max(table) < self.num_blocks:
            raise IntegrityError(f"{name}: its table {table.tolist()} has a block outside the cache")
        if not 0 <= num_computed <= num_scheduled <= state.num_tokens:
            raise IntegrityError(
                f"{name}: {num_computed} computed, {num_scheduled} scheduled of {state.num_tokens} tokens"
            )
        if not num_computed <= state.num_seen_tokens <= state.num_tokens:
            raise IntegrityError(
                f"{name}: {state.num_seen_tokens} of {state.num_tokens} tokens seen, {num_computed} computed"
            )
        # An idle stream may have lost blocks that it will need again, but none that it counts as computed.
        least = self.blocks_for(num_scheduled if state.is_idle else state.num_tokens)
        if not least <= len(table) <= self.blocks_for(state.num_tokens):
            raise IntegrityError(
                f"{name}: {len(table)} blocks for {state.num_tokens} tokens, {num_computed} of them computed"
            )
        if state.num_unscheduled_tokens:
            for block in table[num_scheduled // self.block_size :]:
                if self._num_holders[block] != 1:
                    raise IntegrityError(f"{name}: will write block {block}, which is shared")
                if self.cache is not None and block in self.cache:
                    raise IntegrityError(f"{name}: will write block {block}, which the prefix cache knows")
        if self.cache is not None and state.block_digests:
            for index, block in enumerate(table[: num_computed // self.block_size]):
                known = self.cache.digest_of(block)
                if (
                    known is not None
                    and index < len(state.block_digests)
                    and known != state.block_digests[index]
                ):
                    raise IntegrityError(
                        f"{name}: block {block} at {index} of its table holds other tokens than its own"
                    )
