"""Streams that share KV blocks have the bits of each alone: in the operator, and in engines with forks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from feeding import VOCAB, bits, ids, poison
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairwise import grid
from torch import Tensor

from guardengine import Engine, Stream
from guardengine.kernels import cpu, native
from guardengine.kernels.quantization import quantize_rows

pytestmark = pytest.mark.slow

MAX_LEN = 512
# quantization, kv_dtype, dtype: each cache dtype and each format of weights, with both dtypes of activations
MODES = {
    "float32": (None, "auto", "float32"),
    "bfloat16": (None, "auto", "bfloat16"),
    "int8-kv": (None, "int8", "float32"),
    "w8a8-int8-kv": ("w8a8", "int8", "bfloat16"),
    "int8-bf16-kv": ("int8", "bfloat16", "float32"),
}


@pytest.fixture(params=native.usable_isas(), autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GUARDENGINE_ISA", request.param)
    return request.param


# -- the operator ----------------------------------------------------------------------------------------------


def attend(q: Tensor, caches: tuple[Tensor, ...], tables: list[list[int]], rows: list[list[int]]) -> Tensor:
    """Attention of streams with these block tables, rows at these positions of each."""
    padded = torch.full((len(tables), max(map(len, tables))), -1, dtype=torch.int32)
    for index, table in enumerate(tables):
        padded[index, : len(table)] = torch.tensor(table)
    bounds = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0)], dtype=torch.int32)
    positions = torch.tensor([p for row in rows for p in row])
    return cpu.paged_attention(q, *caches[:2], padded, bounds, positions, q.shape[-1] ** -0.5, *caches[2:])


def filled_caches(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, kv_dtype: torch.dtype):
    generator = torch.Generator().manual_seed(num_blocks)
    values = torch.randn(2, num_blocks, block_size, num_kv_heads, head_dim, generator=generator)
    if kv_dtype != torch.int8:
        return tuple(values.to(kv_dtype))
    integers, scales = quantize_rows(values)
    return *integers, *scales.transpose(2, 3).contiguous()


CASES: dict[str, tuple[list[list[int]], list[list[int]]]] = {  # block tables and rows, in blocks of 16 tokens
    "two branches": ([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 6]], [[90], [95]]),
    "one block": ([[0], [0], [0]], [[3], [15], [0]]),
    "identical": ([[3, 1, 2, 7, 8]] * 5, [[79]] * 5),
    "shorter ones": ([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2], [0, 1, 2, 3, 4]], [[111], [40], [70]]),
    "chunks": ([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7]], [list(range(64, 92)), list(range(70, 81))]),
    "rows within what is shared": ([[0, 1, 2, 3, 4]] * 2, [[5, 30, 63], [70, 79]]),
    "two families": ([[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [6, 7, 8, 9, 10], [6, 7, 8, 9, 11]], [[79]] * 4),
    "families take turns": (
        [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10], [0, 1, 2, 3, 5], [6, 7, 8, 9, 11]],
        [[75]] * 4,
    ),
    "strangers between": ([[0, 1, 2, 3, 4], [12, 13], [0, 1, 2, 3, 5], [14]], [[70], [20], [72], [9]]),
    "forks of forks": (
        [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 7], [0, 1, 2, 3, 4, 8, 9], [0, 1, 10, 11, 12, 13, 14]],
        [[100], [101], [102], [103]],
    ),
    "the same block elsewhere": ([[0, 1, 2, 3, 4], [5, 1, 2, 3, 4], [0, 2, 1, 3, 4]], [[79], [79], [79]]),
    "no rows first": ([[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 3, 6]], [[], [70], [71]]),
    "no rows between": ([[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 3, 6]], [[70], [], [71]]),
    "twenty": ([[0, 1, 2, 3, 4, 20 + i] for i in range(20)], [[80 + i % 16] for i in range(20)]),
    "seventy": ([[0, 1, 2, 3, 4, 20 + i] for i in range(70)], [[80 + i % 16] for i in range(70)]),
}


# Pairs of case, shape and cache, for every instruction set.
@grid(
    case=list(CASES),
    shape=[(4, 2, 32), (16, 1, 64), (80, 1, 32), (3, 3, 128)],
    kv_dtype=[torch.float32, torch.bfloat16, torch.int8],
)
def test_attention_over_shared_blocks(case: str, shape: tuple[int, int, int], kv_dtype: torch.dtype) -> None:
    num_heads, num_kv_heads, head_dim = shape
    tables, rows = CASES[case]
    dtype = torch.bfloat16 if kv_dtype == torch.bfloat16 else torch.float32
    for block_size in (16, 5):  # of the second one 5 positions for each 16
        at = [[p * block_size // 16 for p in row] for row in rows]
        at = [sorted(set(row)) for row in at]
        caches = filled_caches(96, block_size, num_kv_heads, head_dim, kv_dtype)
        q = torch.randn(sum(map(len, at)), num_heads, head_dim, generator=torch.Generator().manual_seed(1))
        q = q.to(dtype)
        together = attend(q, caches, tables, at)
        start = 0
        for table, own in zip(tables, at, strict=True):
            stop = start + len(own)
            if own:
                alone = attend(q[start:stop], caches, [table], [own])
                assert torch.equal(together[start:stop], alone), (block_size, table)
            start = stop


def test_what_branches_share_must_not_leak_between_lengths() -> None:
    """Shared blocks hold tokens that are past a shorter branch's position: broken here, and not read."""
    for kv_dtype in (torch.float32, torch.int8):
        caches = filled_caches(8, 16, 1, 32, kv_dtype)
        tables, rows = [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 3]], [[70], [71], [50]]
        q = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))
        expected = attend(q, caches, tables, rows)
        poisoned = caches[-1] if kv_dtype == torch.int8 else caches[1]
        poisoned[(3, slice(None), slice(3, 16)) if kv_dtype == torch.int8 else (3, slice(3, 16))] = torch.nan
        found = attend(q, caches, tables, rows)
        assert found[:2].isnan().all()
        assert torch.equal(found[2], expected[2])


# -- engines ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines(checkpoints: Callable[..., Path]) -> Iterator[Callable[..., Engine]]:
    """engines(mode, isa, **options) -> an engine, made once; its cache is poisoned."""
    made: dict[str, Engine] = {}

    def get(mode: str, isa: str, *, heads: tuple[int, int] = (4, 2), **options) -> Engine:
        key = repr((mode, isa, heads, sorted(options.items())))
        if key not in made:
            folder = checkpoints(
                vocab_size=VOCAB, dtype="bfloat16", num_attention_heads=heads[0], num_key_value_heads=heads[1]
            )
            quantization, kv_dtype, dtype = MODES[mode]
            limits = {"kv_cache_bytes": 2**23, "max_model_len": MAX_LEN, "block_size": 16} | options
            engine = Engine.from_pretrained(
                folder, backend="cpu", quantization=quantization, kv_dtype=kv_dtype, dtype=dtype, **limits
            )
            made[key] = poison(engine)
        return made[key]

    yield get
    for engine in made.values():
        engine.close()


def assert_as_alone(engine: Engine, streams: list[Stream]) -> None:
    """Closes the streams and compares labels with one prefill of their tokens with nothing else around.

    Of many streams some: the first, the last, and every few between.
    """
    found = [(stream.token_ids, bits(stream.labels)) for stream in streams]
    found = found[:: max(1, len(found) // 5)] + found[-1:]
    engine.check_integrity()
    for stream in streams:
        stream.close()
    assert engine.stats()["kv_blocks_free"] == engine.stats()["kv_blocks_total"]
    for token_ids, own in found:
        with engine.open(token_ids=token_ids, role="assistant") as fresh:
            engine.run()
            assert np.array_equal(bits(fresh.labels), own)


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def decode(engine: Engine, streams: list[Stream], num_tokens: list[int], seed: int) -> None:
    """One token a step for each stream, as many as it is to get."""
    texts = [ids(count, seed + i) for i, count in enumerate(num_tokens)]
    for index in range(max(num_tokens)):
        for stream, text in zip(streams, texts, strict=True):
            if index < len(text):
                stream.append(text[index : index + 1])
        engine.step()
    engine.run()


# Pairs of family, mode and instruction set.
@grid(
    family=[(64, 2, (4, 2)), (77, 40, (4, 2)), (128, 5, (16, 1)), (200, 20, (4, 2)), (130, 9, (16, 1))],
    mode=list(MODES),
    isa=native.usable_isas(),
    indirect=["isa"],
)
def test_branches_of_one_prompt(
    engines, family: tuple[int, int, tuple[int, int]], mode: str, isa: str
) -> None:
    shared, branches, heads = family
    engine = engines(mode, isa, heads=heads)
    prompt = engine.open(token_ids=ids(shared, 1), role="assistant")
    engine.run()
    streams = [prompt, *(prompt.fork() for _ in range(branches))]
    decode(engine, streams, [3 + i % 5 for i in range(len(streams))], seed=100)
    assert_as_alone(engine, streams)


@pytest.mark.parametrize(
    ("mode", "block_size"),
    [
        *itertools.product(("float32", "w8a8-int8-kv"), (1, 3, 16, 64)),
        *(("bfloat16", 16), ("int8-kv", 5), ("int8-bf16-kv", 32)),
    ],
)
def test_families_forks_of_forks_and_strangers(engines, mode: str, isa: str, block_size: int) -> None:
    engine = engines(mode, isa, block_size=block_size)
    streams = []
    for family in range(2):
        first = engine.open(token_ids=ids(90 + 41 * family, family), role="assistant")
        engine.run()
        second = first.fork()
        decode(engine, [first, second], [2, 30], seed=10 + family)
        third = second.fork()
        decode(engine, [second, third], [1, 35], seed=20 + family)
        streams += [first, second, third, third.fork(), third.fork(), first.fork()]
        streams.append(engine.open(token_ids=ids(50 + family, 30 + family), role="assistant"))
    random.Random(1).shuffle(streams)
    decode(engine, streams, [2 + i % 7 for i in range(len(streams))], seed=40)
    for index, stream in enumerate(streams):  # chunks of several tokens, some of them, at once
        if index % 3:
            stream.append(ids(1 + 2 * index, 60 + index))
    engine.run()
    assert_as_alone(engine, streams)


# Pairs of mode, what is kept and instruction set.
@grid(
    mode=["bfloat16", "int8-kv", "w8a8-int8-kv"],
    kept=[129, 128, 127, 3],
    isa=native.usable_isas(),
    indirect=["isa"],
)
def test_rollback_of_one_branch(engines, mode: str, isa: str, kept: int) -> None:
    """Into what is shared: the others read on, the branch writes its own."""
    engine = engines(mode, isa)
    first = engine.open(token_ids=ids(130, 1), role="assistant")
    engine.run()
    streams = [first, first.fork(), first.fork(), first.fork()]
    decode(engine, streams, [4, 5, 6, 7], seed=3)
    streams[1].rollback(135 - kept)
    decode(engine, streams, [3, 20, 2, 1], seed=13)
    streams[0].rollback(137 - kept)
    streams.append(streams[1].fork())
    decode(engine, streams, [9, 2, 3, 4, 5], seed=23)
    assert_as_alone(engine, streams)


def test_closing_the_parent_leaves_its_branches(engines, mode: str, isa: str) -> None:
    engine = engines(mode, isa)
    parent = engine.open(token_ids=ids(100, 1), role="assistant")
    engine.run()
    streams = [parent.fork() for _ in range(4)]
    parent.close()
    streams.append(engine.open(token_ids=ids(150, 2), role="assistant"))
    decode(engine, streams, [5, 5, 17, 5, 5], seed=3)
    assert_as_alone(engine, streams)


# -- any tree of forks -----------------------------------------------------------------------------------------


@dataclass
class Tree:
    """One operation after the other, drawn by hypothesis: (what, which stream, how much)."""

    operations: list[tuple[str, int, int]] = field(default_factory=list)

    def play(self, engine: Engine) -> list[Stream]:
        streams: list[Stream] = []
        for seed, (what, which, size) in enumerate(self.operations):
            stream = streams[which % len(streams)] if streams else None
            if what == "open" or stream is None:
                streams.append(engine.open(token_ids=ids(size, seed), role="assistant"))
            elif what == "fork" and len(streams) < 24:
                streams.append(stream.fork())
            elif what == "append" and len(stream.token_ids) + size % 40 < MAX_LEN:
                stream.append(ids(1 + size % 40, seed))
            elif what == "decode":
                room = [s for s in streams if len(s.token_ids) + size % 6 < MAX_LEN]
                if room:
                    decode(engine, room, [1 + size % 5] * len(room), seed * 100)
            elif what == "rollback":
                stream.rollback(size % len(stream.token_ids))  # leaves a token at least
            elif what == "run":
                engine.run()
        engine.run()
        return streams


OPERATIONS = st.tuples(
    st.sampled_from(["open", "fork", "fork", "fork", "append", "decode", "decode", "rollback", "run"]),
    st.integers(0, 23),
    st.one_of(st.integers(1, 200), st.sampled_from([16, 63, 64, 65, 128])),
)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["float32", "w8a8-int8-kv"])
def test_any_tree_of_forks(engines, mode: str, isa: str) -> None:
    @settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(first=st.integers(1, 200), operations=st.lists(OPERATIONS, min_size=3, max_size=20))
    def check(first: int, operations: list[tuple[str, int, int]]) -> None:
        engine = engines(mode, isa, max_num_batched_tokens=300, kv_cache_bytes=2**24)
        streams = []
        try:
            streams = Tree([("open", 0, first), ("run", 0, 0), *operations]).play(engine)
            assert_as_alone(engine, streams)
        finally:
            for stream in list(engine.core.states.values()):
                engine.core.close_stream(stream)

    check()
