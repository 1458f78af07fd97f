"""build_batch(): exact tensors of hand-made chunks."""

import doctest
from array import array

import torch

from guardengine import Policy
from guardengine.core import layout
from guardengine.core.layout import build_batch
from guardengine.core.scheduler import Chunk
from guardengine.core.state import StreamState, Wanted


def stream(name: str, ids: range, num_computed: int, table: list[int], wanted: list[Wanted]) -> StreamState:
    state = StreamState(name, Policy.strict(), [], block_table=array("i", table), wanted=wanted)
    state.token_ids.extend(ids)
    state.num_computed_tokens = num_computed
    return state


def test_the_worked_example_runs() -> None:
    result = doctest.testmod(layout)
    assert (result.failed, result.attempted >= 15) == (0, True)


def test_ragged_layout() -> None:
    prompt = stream("p", range(100, 107), 2, [5, 3], [Wanted(6, "user")])  # 3 of 5 pending tokens run
    reply = stream("r", range(200, 206), 4, [7, 1], [Wanted(4, "assistant"), Wanted(5, "assistant")])
    chunks = [Chunk(prompt, 2, 3), Chunk(reply, 4, 2)]
    batch, completed = build_batch(chunks, block_size=4)

    assert batch.input_ids.tolist() == [102, 103, 104, 204, 205]
    assert batch.rows.positions.tolist() == [2, 3, 4, 4, 5]
    assert batch.rows.cu_seqlens_q.tolist() == [0, 3, 5]
    assert batch.slot_mapping.tolist() == [5 * 4 + 2, 5 * 4 + 3, 3 * 4, 1 * 4, 1 * 4 + 1]
    assert batch.block_tables.tolist() == [[5, 3], [7, 1]]
    # The prompt's label lies past this chunk, so only the reply's rows reach the heads.
    assert batch.label_index.tolist() == [3, 4]
    assert batch.label_rows.positions.tolist() == [4, 5]
    assert batch.label_rows.cu_seqlens_q.tolist() == [0, 0, 2]
    assert completed == [[], [(0, Wanted(4, "assistant")), (1, Wanted(5, "assistant"))]]


def test_dtypes() -> None:
    batch, _ = build_batch([Chunk(stream("s", range(3), 0, [0], []), 0, 3)], 4)
    for tensor in (batch.input_ids, batch.slot_mapping, batch.label_index, batch.rows.positions):
        assert tensor.dtype == torch.int64
    assert batch.rows.cu_seqlens_q.dtype == batch.block_tables.dtype == torch.int32


def test_both_roles_at_one_position_share_a_row() -> None:
    wanted = [Wanted(p, role) for p in range(3) for role in ("user", "assistant")]
    batch, completed = build_batch([Chunk(stream("s", range(3), 0, [2], wanted), 0, 3)], 4)
    assert batch.label_index.tolist() == [0, 1, 2]
    assert [row for row, _ in completed[0]] == [0, 0, 1, 1, 2, 2]


def test_block_tables_are_padded_with_minus_one() -> None:
    short = stream("a", range(2), 0, [1], [])
    long = stream("b", range(9), 8, [4, 6, 2], [])
    batch, _ = build_batch([Chunk(short, 0, 2), Chunk(long, 8, 1)], 4)
    assert batch.block_tables.tolist() == [[1, -1, -1], [4, 6, 2]]


def test_no_labels_wanted() -> None:
    batch, completed = build_batch([Chunk(stream("s", range(2), 0, [0], []), 0, 2)], 4)
    assert batch.label_index.numel() == 0
    assert batch.label_rows.cu_seqlens_q.tolist() == [0, 0]
    assert completed == [[]]


def test_labels_just_outside_of_a_chunk_wait() -> None:
    """One before it, one after it, both, neither."""
    for positions in ([2, 3, 4, 5], [3, 4, 5], [2, 3, 4], [3, 4], [5], [2]):
        reply = stream("r", range(6), 3, [0, 1], [Wanted(p, "assistant") for p in positions])
        _, (completed,) = build_batch([Chunk(reply, 3, 2)], 4)
        assert [wanted.position for _, wanted in completed] == [p for p in positions if 3 <= p < 5]
