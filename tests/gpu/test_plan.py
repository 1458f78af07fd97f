"""The attention plan: every row's keys are covered once, in a form that the kernel can walk."""

from __future__ import annotations

import doctest
import time
from itertools import pairwise

import numpy as np
import pytest
from pairwise import grid

from guardengine.kernels.gpu import plan as plans
from guardengine.kernels.gpu.plan import SEGMENT, max_plan_size, max_scratch_rows, plan_attention


def items_of(plan: np.ndarray) -> np.ndarray:
    count = plan[plans.NUM_ITEMS] + plan[plans.NUM_TALL_ITEMS]
    end = plans.HEADER_SIZE + count * plans.ITEM_FIELDS
    return plan[plans.HEADER_SIZE : end].reshape(-1, plans.ITEM_FIELDS)


class Batch:
    """Streams with rows at these positions; every block id is used once, so that an id tells where it stood."""

    def __init__(self, wanted: list[list[int]], block_size: int, spare_blocks: int = 2) -> None:
        self.wanted, self.block_size = wanted, block_size
        self.cu_seqlens = np.cumsum([0, *map(len, wanted)]).astype(np.int32)
        self.positions = np.array([p for rows in wanted for p in rows], dtype=np.int64)
        width = max(max(rows, default=0) // block_size + 1 for rows in wanted) + spare_blocks
        self.tables = (
            np.random.default_rng(0).permutation(len(wanted) * width).reshape(-1, width).astype(np.int32)
        )

    def plan(self, tile_rows: int, split: bool, tall_rows: int = 0) -> np.ndarray:
        return plan_attention(
            self.cu_seqlens,
            self.positions,
            self.tables,
            block_size=self.block_size,
            tile_rows=tile_rows,
            tall_rows=tall_rows,
            split=split,
        )


def check(batch: Batch, tile_rows: int, split: bool, tall_rows: int = 0) -> None:
    """What the kernel relies on, item by item and in plain Python."""
    plan = batch.plan(tile_rows, split, tall_rows)
    assert plan.dtype == np.int32
    assert plan[plans.PLAN_SIZE] == len(plan)
    owner = np.repeat(np.arange(len(batch.wanted)), np.diff(batch.cu_seqlens))
    items = items_of(plan)
    first_block_id = plans.HEADER_SIZE + items.size
    seen: dict[int, list[tuple[int, int]]] = {row: [] for row in range(len(owner))}
    scratch: set[int] = set()
    tiles: dict[int, set[int]] = {}
    for index, item in enumerate(items.tolist()):
        first_row, num_rows, first_key, end_key, table, segment, num_segments, scratch_row = item
        is_tall = index >= plan[plans.NUM_ITEMS]
        assert 1 <= num_rows <= (tall_rows if is_tall else tile_rows)
        of_stream = len(batch.wanted[owner[first_row]])
        assert is_tall == (of_stream > 2 * tile_rows and tall_rows > 0 and not split)
        rows = range(first_row, first_row + num_rows)
        assert len({owner[row] for row in rows}) == 1
        assert first_key == segment * SEGMENT < end_key
        last = batch.positions[rows[-1]]
        assert end_key == (min(last + 1, first_key + SEGMENT) if split else last + 1)
        expected = batch.tables[
            owner[first_row], first_key // batch.block_size : (end_key - 1) // batch.block_size + 1
        ]
        assert table >= first_block_id
        assert plan[table : table + len(expected)].tolist() == expected.tolist()
        for row in rows:
            seen[row].append((first_key, end_key))
        if num_segments > 1:
            slots = [scratch_row + segment * num_rows + row for row in range(num_rows)]
            assert not scratch.intersection(slots)
            scratch.update(slots)
        assert segment not in tiles.setdefault(first_row, set())
        tiles[first_row].add(segment)
        assert scratch_row <= max(plan[plans.NUM_SCRATCH_ROWS], 0)
    for row, spans in seen.items():
        spans.sort()
        assert spans[0][0] == 0
        assert spans[-1][1] > batch.positions[row]
        assert all(end == start for (_, end), (start, _) in pairwise(spans))
    for item in items.tolist():
        assert tiles[item[plans.FIRST_ROW]] == set(range(item[plans.NUM_SEGMENTS]))
    assert scratch == set(range(plan[plans.NUM_SCRATCH_ROWS]))
    lengths = items[:, plans.END_KEY] - items[:, plans.FIRST_KEY]
    for part in np.split(lengths, [plan[plans.NUM_ITEMS]]):
        assert (np.diff(part) <= 0).all()

    longest = int(batch.positions.max()) + 1 if len(owner) else 0
    used_blocks = len(plan) - first_block_id
    assert used_blocks == sum(max(rows) // batch.block_size + 1 for rows in batch.wanted if rows)
    assert plan[plans.NUM_SCRATCH_ROWS] <= max_scratch_rows(len(owner), longest)
    assert len(plan) <= max_plan_size(len(owner), longest, used_blocks, split=split)


CASES: list[list[list[int]]] = [
    [[0]],
    [[SEGMENT - 1], [SEGMENT], [SEGMENT + 1]],
    [list(range(40)), [], [5], list(range(SEGMENT - 7, SEGMENT + 9)), []],
    [[2, 7, 300, 301, 1000], [0, 10]],
    [[8191], [8190, 8191], [0]],
    [[], [], [3]],
    [[]],
    [list(range(1000))],
]


@grid(wanted=CASES, sizes=[(1, 16), (8, 16), (16, 1), (4, 3), (5, 512)], split=[True, False])
def test_every_row_sees_its_keys_once(wanted, sizes, split) -> None:
    tile_rows, block_size = sizes
    check(Batch(wanted, block_size), tile_rows, split)
    check(Batch(wanted, block_size), tile_rows, split, tall_rows=5 * tile_rows)


@pytest.mark.parametrize("seed", range(20))
def test_random_batches(seed: int) -> None:
    generator = np.random.default_rng(seed)
    wanted = []
    for _ in range(generator.integers(1, 12)):
        length = int(generator.integers(1, 900))
        count = min(length, int(generator.integers(0, 40)))
        wanted.append(sorted(generator.choice(length, count, replace=False).tolist()))
    check(Batch(wanted, int(generator.integers(1, 40))), int(generator.integers(1, 17)), bool(seed % 2))


def test_padding_rows_get_no_item() -> None:
    batch = Batch([[5], [7, 8]], 4)
    plan = batch.plan(4, True)
    batch.positions = np.concatenate((batch.positions, [10**9, -1]))
    assert np.array_equal(batch.plan(4, True), plan)


def test_a_lone_item_by_hand() -> None:
    plan = plan_attention(
        np.array([0, 2]), np.array([3, 5]), np.array([[9, 4, 8]]), block_size=4, tile_rows=8, split=True
    )
    assert plan.tolist() == [1, 0, 18, 0, 0, 0, 0, 0, 0, 2, 0, 6, 16, 0, 1, 0, 9, 4]


def test_planning_takes_no_time_to_speak_of() -> None:
    """Far above what was measured (docs/speed/h100.md): catches a loop over streams or rows, not a slow machine."""
    batch = Batch([[1023]] * 64, 16)
    elapsed = []
    for _ in range(50):
        start = time.perf_counter()
        batch.plan(8, True)
        elapsed.append(time.perf_counter() - start)
    assert min(elapsed) < 1e-3


def test_the_worked_example_runs() -> None:
    result = doctest.testmod(plans)
    assert result.attempted >= 8
    assert result.failed == 0
