"""Micro-benchmarks of the native operators at the shapes of stream-0.6b, beside what the machine can do.

    pytest benchmarks/bench_ops.py --benchmark-columns=min,median,rounds

Each row's extra_info (in --benchmark-json, and printed at the end) says GB/s and GFLOP/s of the fastest round and the
share of the probed ceiling that binds. The end also names every number of rows that takes longer than a larger one:
rows could be added to it for nothing. Times include the conversion of inputs and outputs, which the engine does not
do; weights and keys are in the cache where they fit. GUARDENGINE_ISA and OMP_NUM_THREADS choose what is measured.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from guardengine.kernels import cpu, native, reference
from guardengine.measuring import machine

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 1024, 16, 8, 128, 3072
LINEARS = {
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD_DIM),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
FORMATS = {"bf16": 2.0, "int8": 1 + 4 / 128, "w8a8": 1.0}  # bytes a weight, scales included where they count
EVERY_ROW_COUNT = "gate_up"
FEW_ROWS = (1, 4, 16, 64)
POINTS = [(name, n) for name in LINEARS for n in (range(1, 65) if name == EVERY_ROW_COUNT else FEW_ROWS)]
ATTENTION = {  # streams, context, new tokens a stream
    "1x256+1": (1, 256, 1),
    "16x256+1": (16, 256, 1),
    "16x1024+1": (16, 1024, 1),
    "16x1024+4": (16, 1024, 4),
    "prefill-512": (1, 512, 512),
    "prefill-2048": (1, 2048, 2048),
}
BLOCK_SIZE = 16
SLACK = 1.05  # by how much a smaller number of rows may be slower: what repeats differ by

_rows: list[str] = []
_linear_times: defaultdict[str, dict[int, float]] = defaultdict(
    dict
)  # of a shape and format, by number of rows


def slower_than_larger(times: dict[int, float]) -> list[tuple[int, int]]:
    """(number of rows, the fastest larger number) of all that take longer than some larger one."""
    found = []
    for num_rows, seconds in sorted(times.items()):
        larger = [(other, count) for count, other in times.items() if count > num_rows]
        if larger and seconds > SLACK * min(larger)[0]:
            found.append((num_rows, min(larger)[1]))
    return found


def slow_spots(kind: str, name: str) -> list[str]:
    """What `slower_than_larger` finds, once each pair was timed in turns: others may have used the machine before."""
    times = _linear_times[kind, name]
    packed, _ = packed_weight(name, kind)
    compared: set[tuple[int, int]] = set()
    while pairs := set(slower_than_larger(times)) - compared:
        compared |= pairs
        for pair in sorted(pairs):
            rows = {count: torch.randn(count, LINEARS[name][1]).bfloat16() for count in pair}
            for _ in range(15):
                for count, x in rows.items():
                    start = time.perf_counter()
                    cpu.linear(x, packed)
                    times[count] = min(times[count], time.perf_counter() - start)
    return [
        f"slower than a larger one: {kind} {name}: {few} rows take {times[few] * 1e6:.0f} us, "
        f"{more} rows {times[more] * 1e6:.0f} us"
        for few, more in slower_than_larger(times)
    ]


@pytest.fixture(scope="module")
def ceilings() -> machine.Ceilings:
    return machine.probe_ceilings(torch.get_num_threads())


@pytest.fixture(scope="module", autouse=True)
def summary(ceilings: machine.Ceilings, request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(
            f"\n{native.choose_isa()}, {ceilings.num_threads} threads; ceilings: "
            f"{ceilings.read_bytes_per_s / 1e9:.1f} GB/s, {ceilings.fp32_flops / 1e9:.0f} GFLOP/s fp32, "
            f"{ceilings.bf16_flops / 1e9:.0f} GFLOP/s bf16 dot, {ceilings.int8_ops / 1e9:.0f} GOP/s int8",
            *_rows,
            *(line for kind, name in list(_linear_times) for line in slow_spots(kind, name)),
            sep="\n",
        )


def report(
    benchmark, ceilings: machine.Ceilings, name: str, num_bytes: float, flops: float, *, is_int8: bool = False
) -> None:
    """Add the rates of the fastest round; the floor is the longer of reading and computing."""
    fastest = benchmark.stats.stats.min
    peak = max(ceilings.fp32_flops, ceilings.bf16_flops)
    if is_int8:
        peak = ceilings.int8_ops or ceilings.fp32_flops
    floor = max(num_bytes / ceilings.read_bytes_per_s, flops / peak)
    rates = {"gb_per_s": num_bytes / fastest / 1e9, "gflop_per_s": flops / fastest / 1e9}
    benchmark.extra_info.update(rates, share_of_floor=floor / fastest)
    _rows.append(
        f"{name:24s} {fastest * 1e6:10.0f} us {rates['gb_per_s']:8.1f} GB/s "
        f"{rates['gflop_per_s']:8.1f} GFLOP/s {floor / fastest:6.0%} of the floor"
    )


@lru_cache(maxsize=2)
def packed_weight(name: str, kind: str) -> tuple[native.Packed, Tensor]:
    """A matrix as the kernels take it and, for checking, as plain PyTorch does."""
    weight = torch.randn(LINEARS[name], generator=torch.Generator().manual_seed(1)).bfloat16()
    if kind == "bf16":
        return native.Packed(cpu._workers(), weight), weight.float()
    return cpu.quantize(weight, kind), reference.quantize(weight, kind)


@pytest.mark.parametrize(("name", "num_rows"), POINTS)
@pytest.mark.parametrize("kind", FORMATS)
def test_linear(benchmark, ceilings: machine.Ceilings, kind: str, name: str, num_rows: int) -> None:
    (out, inner), (packed, plain) = LINEARS[name], packed_weight(name, kind)
    x = torch.randn(num_rows, inner).bfloat16()
    expected = reference.linear(x.float(), plain)
    error = (cpu.linear(x, packed).float() - expected).abs().max()
    assert error <= expected.abs().max() / 256  # correct before it is timed: one bf16 rounding of the largest
    benchmark.pedantic(cpu.linear, (x, packed), rounds=10, iterations=3, warmup_rounds=1)
    _linear_times[kind, name][num_rows] = benchmark.stats.stats.min
    flops = 2.0 * num_rows * out * inner
    report(
        benchmark,
        ceilings,
        f"{kind} {name} x {num_rows}",
        FORMATS[kind] * out * inner,
        flops,
        is_int8=kind == "w8a8",
    )


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_attention(benchmark, ceilings: machine.Ceilings, kv_dtype: str, name: str) -> None:
    streams, context, new = ATTENTION[name]
    num_blocks = streams * -(-context // BLOCK_SIZE)
    shape = (num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    scales: tuple[Tensor, ...] = ()
    if kv_dtype == "int8":
        cache = torch.randint(-127, 128, shape, dtype=torch.int8)
        both = torch.rand(shape[:-1]) / 50
        scales = both[:, 0], both[:, 1]
    else:
        cache = torch.randn(shape).bfloat16()
    cache = cache.transpose(2, 3)
    arguments = (
        torch.randn(streams * new, HEADS, HEAD_DIM).bfloat16(),
        cache[:, 0],
        cache[:, 1],
        torch.randperm(num_blocks).view(streams, -1).int(),
        torch.arange(streams + 1).int() * new,
        torch.arange(context - new, context).repeat(streams),
        HEAD_DIM**-0.5,
        *scales,
    )
    assert cpu.paged_attention(*arguments).isfinite().all()
    benchmark.pedantic(cpu.paged_attention, arguments, rounds=7, iterations=1, warmup_rounds=1)
    attended = streams * sum(range(context - new + 1, context + 1))
    head_bytes = HEAD_DIM + 4 if kv_dtype == "int8" else 2 * HEAD_DIM
    num_bytes = 2.0 * streams * context * KV_HEADS * head_bytes
    report(benchmark, ceilings, f"attention {kv_dtype} {name}", num_bytes, 4.0 * attended * HEADS * HEAD_DIM)
