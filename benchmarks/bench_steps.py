"""Time single steps of the native engine at fixed points and print the share of the floor that each reaches.

    python benchmarks/bench_steps.py --schemes none,int8,w8a8 --points 1x256,16x256,64x1024,burst16,prefill2048

A point is STREAMSxCONTEXT (one token a stream), burstK (one stream, K tokens after 256) or prefillN. Nothing is
computed to get there: the KV cache is filled with numbers, blocks in random order, and one batch is run again and
again. That leaves out scheduling and labels, which `python -m guardengine.bench` measures, and reaches 64 x 1,024 in
seconds.

The floor of a step is the longer of reading (weights and every stream's keys and values once, over the read bandwidth)
and computing (over the peak of the instructions that the scheme could use), both probed right before and after a point,
the best of them counting. All schemes take turns, round by round, so that what else the machine does meets them alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from guardengine import Engine
from guardengine.bench.checkpoints import STREAM_PRESETS, cached_checkpoint
from guardengine.bench.compare import ComparePoint
from guardengine.bench.floor import CostModel, Limits
from guardengine.errors import GuardEngineError
from guardengine.measuring import machine
from guardengine.measuring.files import markdown_table
from guardengine.runners.batch import Batch, Rows

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from points import name_point, read_point

SCHEMES: dict[str, dict[str, Any]] = {
    "none": {},
    "int8": {"quantization": "int8"},
    "w8a8": {"quantization": "w8a8"},
    "kv8": {"kv_dtype": "int8"},
    "int8-kv8": {"quantization": "int8", "kv_dtype": "int8"},
    "w8a8-kv8": {"quantization": "w8a8", "kv_dtype": "int8"},
}
BLOCK_SIZE = 16


@dataclass
class Row:
    """One scheme at one point."""

    scheme: str
    point: str
    num_tokens: int
    ms: list[float]
    floor_ms: float
    bound: str
    read_gb_per_s: float
    peak_gflops: float

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


def make_batch(point: ComparePoint, shared_blocks: int = 0) -> Batch:
    """One step's input: `point.k` tokens of each stream after its context. `shared_blocks` of them are the first's."""
    length = point.context_len + point.k
    per_stream = -(-length // BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    tables = (
        torch.randperm(point.num_streams * per_stream, generator=generator).view(point.num_streams, -1).int()
    )
    tables[:, :shared_blocks] = tables[0, :shared_blocks]
    positions = torch.arange(point.context_len, length).repeat(point.num_streams)
    owner = torch.arange(point.num_streams).repeat_interleave(point.k)
    slots = tables[owner, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    rows = Rows(positions, (torch.arange(point.num_streams + 1) * point.k).int())
    ids = torch.randint(0, 512, (len(positions),), generator=generator)
    return Batch(ids, rows, slots, tables, torch.arange(len(positions)), rows)


def open_engine(folder: Path, scheme: str, point: ComparePoint, threads: int | None) -> Engine:
    blocks = point.num_streams * -(-(point.context_len + point.k) // BLOCK_SIZE)
    config = json.loads((folder / "config.json").read_text())
    token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    num_bytes = blocks * BLOCK_SIZE * token * (1 if "kv8" in scheme else 2)
    engine = Engine.from_pretrained(
        folder,
        backend="cpu",
        num_threads=threads,
        kv_cache_bytes=num_bytes + num_bytes // 16 + 2**21,
        **SCHEMES[scheme],
    )
    cache = engine.core.runner.kv_cache
    cache.values.view(-1).fill_(37 if "kv8" in scheme else 0.3)
    if cache.scales is not None:
        cache.scales.fill_(0.01)
    return engine


def measure(folder: Path, point: ComparePoint, schemes: list[str], options: argparse.Namespace) -> list[Row]:
    """All schemes at one point, taking turns."""
    batch = make_batch(point)
    engines = {scheme: open_engine(folder, scheme, point, options.threads) for scheme in schemes}
    times: dict[str, list[float]] = {scheme: [] for scheme in schemes}
    first = next(iter(engines.values())).core.runner
    probes = [machine.probe_ceilings(first.num_threads)]
    for engine in engines.values():
        engine.core.runner.launch(batch).wait()
    start = time.perf_counter()
    while min(map(len, times.values())) < options.rounds and time.perf_counter() - start < options.seconds:
        for scheme, engine in engines.items():
            began = time.perf_counter()
            engine.core.runner.launch(batch).wait()
            times[scheme].append(1e3 * (time.perf_counter() - began))
    probes.append(machine.probe_ceilings(first.num_threads))
    rows = []
    context = range(point.context_len, point.context_len + point.k)
    for scheme, engine in engines.items():
        quantization = SCHEMES[scheme].get("quantization")
        limits = Limits.best_of(probes, "bfloat16", quantization)
        cost = CostModel(first.config, 1 if quantization else 2, 1 if "kv8" in scheme else 2)
        floor, bound = limits.seconds(cost.of_tokens([context] * point.num_streams))
        rows.append(
            Row(
                scheme,
                name_point(point),
                len(batch.input_ids),
                times[scheme],
                1e3 * floor,
                bound,
                limits.read_bytes_per_s / 1e9,
                limits.flops_per_s / 1e9,
            )
        )
        engine.close()
    return rows


def table(rows: list[Row]) -> str:
    return markdown_table(
        ("point", "scheme", "ms", "fastest", "tokens/s", "floor ms", "of floor", "GB/s", "GFLOP/s"),
        [
            (
                row.point,
                row.scheme,
                f"{row.median:.1f}",
                f"{min(row.ms):.1f}",
                f"{1e3 * row.num_tokens / row.median:.0f}",
                f"{row.floor_ms:.1f} ({row.bound})",
                f"{row.floor_ms / row.median:.0%}",
                f"{row.read_gb_per_s:.1f}",
                f"{row.peak_gflops:.0f}",
            )
            for row in rows
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=STREAM_PRESETS, default="stream-0.6b")
    parser.add_argument("--schemes", default="none,int8,w8a8", help=f"of {', '.join(SCHEMES)} (%(default)s)")
    parser.add_argument("--points", default="1x256,4x256,16x256,64x256,64x1024,burst16,prefill2048")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60, help="at a point, at most (%(default)g)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    try:
        points = [read_point(text) for text in options.points.split(",")]
        schemes = options.schemes.split(",")
        for scheme in schemes:
            if scheme not in SCHEMES:
                parser.error(f"scheme {scheme!r}: choose from {', '.join(SCHEMES)}")
        folder = cached_checkpoint(options.preset)
        rows: list[Row] = []
        for point in tqdm(points, "points", unit="point"):
            rows += measure(folder, point, schemes, options)
            tqdm.write(table(rows[-len(schemes) :]))
    except GuardEngineError as error:
        print(f"bench_steps: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    if options.json:
        record = {"machine": machine.machine_stamp(), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
