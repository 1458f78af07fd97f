"""Micro-benchmarks of the native operators at the shapes of stream-0.6b, beside what the machine can do.

    pytest benchmarks/bench_ops.py --benchmark-columns=min,median,rounds

Each row's extra_info (in --benchmark-json, and printed at the end) says GB/s and GFLOP/s of the fastest round and the
share of the probed ceiling that binds. Times include the conversion of inputs and outputs, which the engine does not
do; weights and keys are in the cache where they fit. GUARDENGINE_ISA and OMP_NUM_THREADS choose what is measured.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from guardengine import machine
from guardengine.kernels import cpu, native

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 1024, 16, 8, 128, 3072
LINEARS = {
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD_DIM),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
ROWS = (1, 2, 3, 4, 6, 8, 12, 13, 16, 24, 32, 48, 64)
ATTENTION = {  # streams, context, new tokens a stream
    "1x256+1": (1, 256, 1),
    "16x256+1": (16, 256, 1),
    "16x1024+1": (16, 1024, 1),
    "16x1024+4": (16, 1024, 4),
    "prefill-512": (1, 512, 512),
    "prefill-2048": (1, 2048, 2048),
}
BLOCK_SIZE = 16

_rows: list[str] = []


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
            f"{ceilings.bf16_flops / 1e9:.0f} GFLOP/s bf16 dot",
            *_rows,
            sep="\n",
        )


def report(benchmark, ceilings: machine.Ceilings, name: str, num_bytes: float, flops: float) -> None:
    """Add the rates of the fastest round; the floor is the longer of reading and computing."""
    fastest = benchmark.stats.stats.min
    peak = max(ceilings.fp32_flops, ceilings.bf16_flops)
    floor = max(num_bytes / ceilings.read_bytes_per_s, flops / peak)
    rates = {"gb_per_s": num_bytes / fastest / 1e9, "gflop_per_s": flops / fastest / 1e9}
    benchmark.extra_info.update(rates, share_of_floor=floor / fastest)
    _rows.append(
        f"{name:24s} {fastest * 1e6:10.0f} us {rates['gb_per_s']:8.1f} GB/s "
        f"{rates['gflop_per_s']:8.1f} GFLOP/s {floor / fastest:6.0%} of the floor"
    )


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("name", LINEARS)
def test_linear(benchmark, ceilings: machine.Ceilings, name: str, num_rows: int) -> None:
    out, inner = LINEARS[name]
    weight, x = torch.randn(out, inner).bfloat16(), torch.randn(num_rows, inner).bfloat16()
    packed = native.Packed(cpu._workers(), weight)
    exact = x.double() @ weight.double().T
    error = (cpu.linear(x, packed).double() - exact).abs().max()
    assert error <= exact.abs().max() / 256  # correct before it is timed: one bf16 rounding of the largest
    benchmark.pedantic(cpu._linear_packed, (x, packed), rounds=10, iterations=3, warmup_rounds=1)
    report(benchmark, ceilings, f"{name} x {num_rows}", 2.0 * out * inner, 2.0 * num_rows * out * inner)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(benchmark, ceilings: machine.Ceilings, name: str) -> None:
    streams, context, new = ATTENTION[name]
    num_blocks = streams * -(-context // BLOCK_SIZE)
    cache = torch.randn(num_blocks, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM).bfloat16().transpose(2, 3)
    arguments = (
        torch.randn(streams * new, HEADS, HEAD_DIM).bfloat16(),
        cache[:, 0],
        cache[:, 1],
        torch.randperm(num_blocks).view(streams, -1).int(),
        torch.arange(streams + 1).int() * new,
        torch.arange(context - new, context).repeat(streams),
        HEAD_DIM**-0.5,
    )
    assert cpu.paged_attention(*arguments).isfinite().all()
    benchmark.pedantic(cpu.paged_attention, arguments, rounds=7, iterations=1, warmup_rounds=1)
    attended = streams * sum(range(context - new + 1, context + 1))
    num_bytes = 4.0 * streams * context * KV_HEADS * HEAD_DIM
    report(benchmark, ceilings, f"attention {name}", num_bytes, 4.0 * attended * HEADS * HEAD_DIM)
