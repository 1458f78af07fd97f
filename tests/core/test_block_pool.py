"""BlockPool's books, with exact block ids: no model, no tensors."""

import pytest

from guardengine import IntegrityError, Overloaded, Policy
from guardengine.core.block_pool import BlockPool
from guardengine.core.state import StreamState


def stream(num_tokens: int = 0, num_computed: int = 0, name: str = "s") -> StreamState:
    state = StreamState(name, Policy.strict(), [])
    state.token_ids.extend(range(num_tokens))
    state.advance(num_computed, [])
    return state


def grown(pool: BlockPool, num_tokens: int, num_computed: int = 0, name: str = "s") -> StreamState:
    state = stream(num_tokens, num_computed, name)
    pool.grow(state, num_tokens, no_copy)
    return state


def no_copy(source: int, destination: int) -> None:
    raise AssertionError(f"block {source} copied to {destination}")


def branch_of(pool: BlockPool, parent: StreamState, name: str = "branch") -> StreamState:
    branch = stream(parent.num_tokens, parent.num_computed_tokens, name)
    branch.block_table = parent.block_table[: pool.blocks_for(parent.num_computed_tokens)]
    pool.share(branch.block_table)
    return branch


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_table_covers_tokens_exactly(num_tokens: int, num_blocks: int) -> None:
    pool = BlockPool(4, block_size=4)
    state = grown(pool, num_tokens)
    assert state.block_table.tolist() == list(range(num_blocks))
    assert pool.num_free == 4 - num_blocks
    pool.check_integrity([state])


def test_growing_within_a_block_takes_none() -> None:
    pool = BlockPool(4, block_size=4)
    state = grown(pool, 5)
    pool.grow(state, 8, no_copy)
    assert state.block_table.tolist() == [0, 1]


def test_tails_are_reused_first() -> None:
    pool = BlockPool(4, block_size=4)
    first = grown(pool, 12)
    pool.shrink(first, 4)
    assert first.block_table.tolist() == [0]
    assert grown(pool, 12, name="second").block_table.tolist() == [1, 2, 3]


def test_too_few_blocks_changes_nothing() -> None:
    pool = BlockPool(4, block_size=4)
    first = grown(pool, 9)
    second = stream(8, name="second")
    with pytest.raises(Overloaded, match=r"2 KV cache blocks of 4 tokens are needed and 1 of 4 are free"):
        pool.grow(second, 8, no_copy)
    assert second.block_table.tolist() == []
    assert pool.num_free == 1
    pool.check_integrity([first])


def test_a_shared_partial_block_is_copied_before_it_is_written() -> None:
    pool = BlockPool(8, block_size=4)
    parent = grown(pool, 6, num_computed=6)
    branch = branch_of(pool, parent)
    branch.token_ids.append(9)
    copies: list[tuple[int, int]] = []
    pool.grow(branch, 7, lambda *copy: copies.append(copy))
    assert copies == [(1, 2)]
    assert (parent.block_table.tolist(), branch.block_table.tolist()) == ([0, 1], [0, 2])
    # The parent is alone on its block now and writes in place.
    parent.token_ids.append(9)
    pool.grow(parent, 7, no_copy)
    pool.check_integrity([parent, branch])


def test_a_copy_that_does_not_fit_changes_nothing() -> None:
    pool = BlockPool(2, block_size=4)
    parent = grown(pool, 6, num_computed=6)
    branch = branch_of(pool, parent)
    with pytest.raises(Overloaded, match="1 KV cache blocks"):
        pool.grow(branch, 7, no_copy)
    assert branch.block_table.tolist() == [0, 1]
    pool.check_integrity([parent, branch])


def test_a_copy_that_fails_changes_nothing() -> None:
    pool = BlockPool(8, block_size=4)
    parent = grown(pool, 6, num_computed=6)
    branch = branch_of(pool, parent)
    with pytest.raises(AssertionError, match="block 1 copied to 2"):
        pool.grow(branch, 15, no_copy)
    assert branch.block_table.tolist() == [0, 1]
    pool.check_integrity([parent, branch])


def test_a_full_shared_block_is_never_copied() -> None:
    pool = BlockPool(8, block_size=4)
    parent = grown(pool, 8, num_computed=8)
    branch = branch_of(pool, parent)
    branch.token_ids.append(9)
    pool.grow(branch, 9, no_copy)
    assert branch.block_table.tolist() == [0, 1, 2]


def test_a_block_is_free_only_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(4, block_size=4)
    parent = grown(pool, 8, num_computed=8)
    branch = branch_of(pool, parent)
    pool.shrink(parent, 0)
    assert pool.num_free == 2
    pool.shrink(branch, 0)
    assert pool.num_free == 4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool, a, b: a.block_table.__setitem__(0, 3), "on the books"),
        (lambda pool, a, b: a.block_table.append(a.block_table[0]), "twice"),
        (lambda pool, a, b: a.block_table.__setitem__(0, 99), "outside the cache"),
        (lambda pool, a, b: a.token_ids.extend(range(9)), "blocks for"),
        (lambda pool, a, b: setattr(a, "num_computed_tokens", 99), "99 computed"),
        (
            lambda pool, a, b: (pool.share(a.block_table), a.drop_blocks(), setattr(a, "num_seen_tokens", 1)),
            "shared",
        ),
        (lambda pool, a, b: pool._free.append(a.block_table[0]), "free list"),
    ],
)
def test_check_integrity_finds_damage(damage, message: str) -> None:
    pool = BlockPool(8, block_size=4)
    a, b = grown(pool, 8, 8, "a"), grown(pool, 4, 4, "b")
    pool.check_integrity([a, b])
    damage(pool, a, b)
    with pytest.raises(IntegrityError, match=message):
        pool.check_integrity([a, b])
