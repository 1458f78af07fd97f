"""PrefixCache: which KV blocks hold which tokens, so that streams with the same beginning share them.

A full block is known by a digest of everything up to its end, the tenant's salt included:

    digest(block i) = blake2b(digest(block i-1), ids of block i),   digest(block -1) = blake2b(salt)

Labels that were computed in a block are kept with it: a hit hands them out instead of losing them, and a stream
that wants a label which no stream has computed yet is not given the block. No torch; owns no blocks.
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
