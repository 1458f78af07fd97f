"""PrefixCache: which KV blocks hold which tokens, so that streams with the same beginning share them.

A full block is known by a digest of everything up to its end, the tenant's salt included:

    digest(block i) = blake2b(digest(block i-1), ids of block i),   digest(block -1) = blake2b(salt)

Labels that were computed in a block are kept with it: a hit hands them out instead of losing them, and a stream
that wants a label which no stream has computed yet is not given the block. No torch; owns no blocks.

An example with blocks of 4 tokens. The first stream has 10 tokens: two full blocks, and 2 tokens in a third.

    >>> from guardengine.core.block_pool import BlockPool
    >>> from guardengine.policy import Policy
    >>> def stream(name, token_ids, salt="tenant a"):
    ...     return StreamState(name, Policy(), [], token_ids=array("i", token_ids), salt=salt_digest(salt))
    >>> def copy_block(source, destination):
    ...     print(f"block {source} is copied to block {destination}")
    >>> cache = PrefixCache(block_size=4)
    >>> pool = BlockPool(num_blocks=8, block_size=4, cache=cache)
    >>> first = stream("first", range(10))
    >>> pool.grow(first, 10, copy_block)
    >>> first.block_table.tolist()
    [0, 1, 2]

When its tokens are computed, its full blocks become known, each by the digest of all tokens up to its end. So a change
in the first block changes the digests of all, and a change in the second leaves the first as it was:

    >>> first.advance(10, [])
    >>> cache.publish(first, first_block=0, end_block=2)
    >>> [digest.hex()[:4] for digest in first.block_digests]
    ['6cd4', '01a6']
    >>> for token_ids in ([9, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 9, 5, 6, 7]):
    ...     other = stream("other", token_ids)
    ...     extend_digests(other.block_digests, other.salt, other.token_ids, block_size=4)
    ...     print([digest.hex()[:4] for digest in other.block_digests])
    ['039e', '56ae']
    ['6cd4', '9184']

A hit: another stream begins with the same 8 tokens, so it is given their blocks, and only what follows is computed. A
stream of another tenant has another salt, so it is given none:

    >>> cache.match(stream("second", [0, 1, 2, 3, 4, 5, 6, 7, 20, 21]))
    Hit(blocks=[0, 1], labels=[])
    >>> cache.match(stream("third", [0, 1, 2, 3, 4, 5, 6, 7, 20, 21], salt="tenant b"))
    Hit(blocks=[], labels=[])

Copy on write: a fork shares its parent's third block too, which is not full. Who goes on first gets a copy to write
into, and the other keeps the block:

    >>> fork = first.copy("fork")
    >>> fork.advance(10, [])
    >>> fork.block_table = first.block_table[:]
    >>> pool.share(fork.block_table)
    >>> fork.token_ids.append(30)
    >>> pool.grow(fork, 11, copy_block)
    block 2 is copied to block 3
    >>> fork.block_table.tolist(), first.block_table.tolist()
    ([0, 1, 3], [0, 1, 2])
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from guardengine.core.state import Reader, StreamState, Wanted
from guardengine.labels import Label

_DIGEST_BYTES = 16


class Hit(NamedTuple):
    """Blocks to share, and the labels that are wanted in them, in order."""

    blocks: list[int]
    labels: list[Label]


@dataclass(slots=True)
class _Entry:
    digest: bytes
    labels: dict[tuple[int, Reader], Label] = field(default_factory=dict)  # by position and role


def salt_digest(salt: str) -> bytes:
    """Where the chain of digests of a tenant's blocks begins."""
    return blake2b(salt.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).digest()


def extend_digests(digests: list[bytes], salt: bytes, token_ids: array[int], block_size: int) -> None:
    """Append the digests of the full blocks of `token_ids` that `digests` lacks."""
    last = digests[-1] if digests else salt
    for start in range(len(digests) * block_size, len(token_ids) - block_size + 1, block_size):
        last = blake2b(
            last + token_ids[start : start + block_size].tobytes(), digest_size=_DIGEST_BYTES
        ).digest()
        digests.append(last)


class PrefixCache:
    """Computed blocks by digest. Whoever reuses a block for other tokens says so first (`forget`)."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.num_queried_tokens = self.num_hit_tokens = 0
        self._blocks: dict[bytes, int] = {}
        self._entries: dict[int, _Entry] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def digest_of(self, block: int) -> bytes | None:
        entry = self._entries.get(block)
        return None if entry is None else entry.digest

    def match(self, state: StreamState) -> Hit:
        """The longest run of known blocks that the stream begins with and whose wanted labels are known."""
        extend_digests(state.block_digests, state.salt, state.token_ids, self.block_size)
        blocks: list[int] = []
        labels: list[Label] = []
        wanted = state.wanted
        next_wanted = 0
        for index, digest in enumerate(state.block_digests):
            block = self._blocks.get(digest)
            if block is None:
                break
            found = _labels_within(
                self._entries[block].labels, wanted, next_wanted, (index + 1) * self.block_size
            )
            if found is None:
                break
            blocks.append(block)
            labels += found
            next_wanted += len(found)
        self.num_queried_tokens += state.num_tokens
        self.num_hit_tokens += len(blocks) * self.block_size
        return Hit(blocks, labels)

    def publish(self, state: StreamState, first_block: int, end_block: int) -> None:
        """Make blocks first_block..end_block-1 of the stream's table known: full, computed, all of them.

        Of several blocks with the same tokens the first stays the known one and takes the others' labels.
        """
        size = self.block_size
        extend_digests(state.block_digests, state.salt, state.token_ids, size)
        entries = []
        for index in range(first_block, end_block):
            digest, block = state.block_digests[index], state.block_table[index]
            known = self._blocks.setdefault(digest, block)
            entries.append(self._entries.setdefault(known, _Entry(digest)))
        for label in state.labels_between(first_block * size, end_block * size):
            entry = entries[label.position // size - first_block]
            entry.labels.setdefault((label.position, label.role), label)

    def forget(self, block: int) -> None:
        """The block is about to hold other tokens."""
        entry = self._entries.pop(block, None)
        if entry is not None:
            del self._blocks[entry.digest]


def _labels_within(
    known: dict[tuple[int, Reader], Label], wanted: Sequence[Wanted], start: int, end_position: int
) -> list[Label] | None:
    """The labels of wanted[start:] before `end_position`, or None when one of them is not known."""
    found: list[Label] = []
    for index in range(start, len(wanted)):
        position, role = wanted[index]
        if position >= end_position:
            break
        label = known.get((position, role))
        if label is None:
            return None
        found.append(label)
    return found
