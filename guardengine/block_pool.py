"""BlockPool: who holds which block of the KV cache. Counts references and nothing else; no torch, no labels.

A stream's block table covers its tokens exactly:

    tokens   | 0 .. S-1 | S .. 2S-1 | 2S .. n-1    |
    table    |    7     |     2     |     9        |      ceil(n / S) blocks
             |   computed: shareable   | pending: this stream's alone

Blocks are taken when tokens are accepted, not when they are computed, so a stream that was let in can always
run. A block may be shared by forks only as far as its tokens are computed; `grow` gives a stream a block of
its own before it writes into one that others can still read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from guardengine.errors import IntegrityError, Overloaded
from guardengine.state import StreamState


class BlockPool:
    """`num_blocks` KV cache blocks of `block_size` tokens, each free or held by one or more streams."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the last freed is the first reused
        self._num_holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def grow(self, stream: StreamState, num_tokens: int, copy_block: Callable[[int, int], None]) -> None:
        """Extend the stream's block table to `num_tokens` tokens, all of its uncomputed ones in its own blocks.

        When the block that the stream will write next is shared, it gets its own one with the same contents:
        `copy_block(source, destination)`. Raises Overloaded, with nothing changed, when too few blocks are free;
        nothing is changed either when the copy fails.
        """
        table = stream.block_table
        first_written = stream.num_computed_tokens // self.block_size
        is_shared = first_written < len(table) and self._num_holders[table[first_written]] > 1
        num_new = self.blocks_for(num_tokens) - len(table)
        if num_new + is_shared > len(self._free):
            raise Overloaded(
                f"{num_new + is_shared} KV cache blocks of {self.block_size} tokens are needed and "
                f"{len(self._free)} of {self.num_blocks} are free; close streams or raise kv_cache_bytes"
            )
        if is_shared:
            source, destination = table[first_written], self._free[-1]
            copy_block(source, destination)
            table[first_written] = self._take()
            self._release(source)
        table.extend(self._take() for _ in range(num_new))

    def share(self, table: Iterable[int]) -> None:
        """Add one holder to each block."""
        for block in table:
            self._num_holders[block] += 1

    def shrink(self, stream: StreamState, num_tokens: int) -> None:
        """Give back the blocks past `num_tokens` tokens; tails first, so that they are reused first."""
        table = stream.block_table
        for _ in range(len(table) - self.blocks_for(num_tokens)):
            self._release(table.pop())

    def _take(self) -> int:
        block = self._free.pop()
        self._num_holders[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._num_holders[block] -= 1
        if not self._num_holders[block]:
            self._free.append(block)

    def check_integrity(self, streams: Iterable[StreamState]) -> None:
        """Raise IntegrityError unless the books agree with the open streams' block tables."""
        holders: Counter[int] = Counter()
        for stream in streams:
            table = stream.block_table
            holders.update(table)
            if len(set(table)) != len(table):
                raise IntegrityError(f"{stream.stream_id}: a block appears twice in its table {table}")
            if table and not 0 <= min(table) <= max(table) < self.num_blocks:
                raise IntegrityError(f"{stream.stream_id}: its table {table} has a block outside the cache")
            if len(table) != self.blocks_for(stream.num_tokens):
                raise IntegrityError(
                    f"{stream.stream_id}: {len(table)} blocks for {stream.num_tokens} tokens"
                )
            if not 0 <= stream.num_computed_tokens <= stream.num_tokens:
                raise IntegrityError(
                    f"{stream.stream_id}: {stream.num_computed_tokens} of {stream.num_tokens} tokens computed"
                )
            if stream.num_pending_tokens:
                for block in table[stream.num_computed_tokens // self.block_size :]:
                    if self._num_holders[block] != 1:
                        raise IntegrityError(f"{stream.stream_id}: will write block {block}, which is shared")
        for block, num_holders in enumerate(self._num_holders):
            if num_holders != holders[block]:
                raise IntegrityError(
                    f"block {block}: {num_holders} holders on the books, {holders[block]} in the tables"
                )
        if sorted(self._free) != [b for b, n in enumerate(self._num_holders) if n == 0]:
            raise IntegrityError(f"the free list {sorted(self._free)[:8]}... is not the set of unheld blocks")
