"""`python -m guardengine.bench --soak 10m`: the load of hours of service in minutes, with everything checked.

The pace of the engine is measured first; conversations then arrive at `--load` times that pace. Every label is checked
to be the next one of its stream, the books are checked every few seconds, and memory is read every second.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from guardengine.bench import report
from guardengine.bench.checkpoints import STREAM_PRESETS, cached_checkpoint
from guardengine.bench.options import exit_status
from guardengine.bench.plot import save_soak_plot
from guardengine.bench.soak.load import MEAN_REPLY_TOKENS, Load
from guardengine.engine.engine import Engine
from guardengine.errors import ConfigError, IntegrityError, Overloaded
from guardengine.measuring.files import check_writable, write_json

_CHECK_EVERY_S = 5.0
_CALIBRATION_STREAMS, _CALIBRATION_PROMPT, _CALIBRATION_S = 64, 64, 3.0
_PROMPT_TOKENS_A_REPLY_TOKEN = 3.5  # of the load: what has to be computed for each token of a reply
_ACTIVE_SHARE = 0.25  # of the open streams; the others are idle
_STATS = (
    "preemptions",
    "kv_blocks_evicted",
    "prefix_tokens_queried",
    "prefix_tokens_hit",
    "tokens_computed",
    "tokens_recomputed",
    "steps",
)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; argparse exits with status 2 and the reason when it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m guardengine.bench", description=__doc__)
    parser.add_argument("--soak", type=_duration, required=True, metavar="TIME", help="90s, 10m, 2h")
    parser.add_argument("--streams", type=int, default=2000, help="open at once, at most (%(default)s)")
    parser.add_argument("--load", type=float, default=0.7, help="share of the measured pace (%(default)s)")
    parser.add_argument("--preset", choices=STREAM_PRESETS, default="stream-0.6b", help="(%(default)s)")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a checkpoint folder instead of a preset"
    )
    parser.add_argument("--kv-cache-mb", type=int, metavar="MIB", help="default: the engine's")
    parser.add_argument("--max-step-ms", type=float, default=None, metavar="MS")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args(arguments)
    if options.streams < 1 or not 0 < options.load <= 100:
        parser.error(
            f"--streams {options.streams} --load {options.load}: at least 1, and above 0 to 100, are needed"
        )
    return options


def run(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Soak an engine; returns the record. Raises IntegrityError at the first label or book that is wrong."""
    for path in (options.json, options.plot):
        if path is not None:
            check_writable(path)
    folder = options.checkpoint or cached_checkpoint(options.preset)
    limits = {"max_num_streams": options.streams, "max_step_ms": options.max_step_ms}
    if options.kv_cache_mb:
        limits["kv_cache_bytes"] = options.kv_cache_mb * 2**20
    record = report.stamp(arguments, options.seed)
    with Engine.from_pretrained(folder, backend=options.backend, progress=True, **limits) as engine:
        vocab_size = engine.core.runner.info.config.vocab_size
        pace = measure_pace(engine, vocab_size)
        # Of the pace, replies get what prompts leave; a conversation is open for its reply and its idle time.
        reply_rate = options.load * pace / (1 + _PROMPT_TOKENS_A_REPLY_TOKEN)
        active = max(1.0, _ACTIVE_SHARE * options.streams)
        arrivals = reply_rate / MEAN_REPLY_TOKENS
        load = Load(
            engine,
            vocab_size=vocab_size,
            arrivals_per_s=arrivals,
            tokens_per_s=max(reply_rate / active, 1e-3),
            idle_s=(1 - _ACTIVE_SHARE) * options.streams / arrivals,
            seed=options.seed,
        )
        record["model"] = {
            key: engine.stats()[key] for key in ("backend", "isa", "dtype", "num_threads", "device")
        }
        record["model"]["name"] = (
            options.checkpoint.name if options.checkpoint else f"{options.preset} (random weights)"
        )
        record["options"] = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
        record["pace_tokens_per_s"] = pace
        record["kv_cache_bytes"] = engine.stats()["kv_cache_bytes"]
        record["samples"] = soak(engine, load, options.soak)
        load.finish()
        engine.check_integrity()
        stats = engine.stats()
        for name in ("kv_blocks_free", "streams_open", "tokens_pending"):
            wanted = stats["kv_blocks_total"] if name == "kv_blocks_free" else 0
            if stats[name] != wanted:
                raise IntegrityError(f"after closing everything {name} is {stats[name]}, not {wanted}")
        record["counts"] = asdict(load.counts)
        record["stats"] = {name: stats[name] for name in _STATS}
        record["latency_s"] = _percentiles([seconds for _, seconds in load.latencies])
        record["latencies"] = _by_second(load.latencies)
    return record


def measure_pace(engine: Engine, vocab_size: int) -> float:
    """Tokens in a second, for 64 streams with one token each (fewer where the KV cache is small)."""
    rng = np.random.default_rng(0)
    stats = engine.stats()
    room = stats["kv_blocks_free"] * stats["block_size"] // (4 * _CALIBRATION_PROMPT)
    count = max(1, min(_CALIBRATION_STREAMS, stats["max_num_streams"], room))
    streams = [
        engine.open(token_ids=rng.integers(vocab_size, size=_CALIBRATION_PROMPT).tolist())
        for _ in range(count)
    ]
    engine.run()
    start, num_tokens = time.perf_counter(), 0
    with contextlib.suppress(Overloaded):  # a cache that is full has been measured for long enough
        while time.perf_counter() - start < _CALIBRATION_S:
            for stream in streams:
                stream.append([int(rng.integers(vocab_size))])
            num_tokens += len(engine.step())
    took = time.perf_counter() - start
    for stream in streams:
        stream.close()
    return num_tokens / took


def soak(engine: Engine, load: Load, duration_s: float) -> list[dict[str, float]]:
    """Run the load. Returns a sample for each second."""
    samples: list[dict[str, float]] = []
    start = time.perf_counter()
    next_check = next_sample = 0.0
    with tqdm(total=round(duration_s), desc="soak", unit="s", mininterval=1) as bar:
        while (now := time.perf_counter() - start) < duration_s:
            load.feed(now)
            stats_due = now >= next_sample
            if engine.core.has_work:
                load.deliver(engine.step(), time.perf_counter() - start)
            else:
                time.sleep(max(0.0, min(load.next_due, next_sample, duration_s) - now))
            if now >= next_check:
                engine.check_integrity()
                next_check = now + _CHECK_EVERY_S
            if stats_due:
                stats = engine.stats()
                samples.append(
                    {
                        "s": round(now, 3),
                        "rss_mb": round(_resident_bytes() / 2**20, 2),
                        "streams_open": stats["streams_open"],
                        "tokens_waiting": stats["tokens_pending"],
                        "preemptions": stats["preemptions"],
                        "kv_blocks_evicted": stats["kv_blocks_evicted"],
                    }
                )
                bar.update(round(now) - bar.n)
                next_sample = now + 1.0
    return samples


def markdown(record: Mapping[str, Any]) -> str:
    """The record as text."""
    counts, stats, latency, samples = (
        record["counts"],
        record["stats"],
        record["latency_s"],
        record["samples"],
    )
    waiting = [sample["tokens_waiting"] for sample in samples]
    rss = [sample["rss_mb"] for sample in samples]
    warm = rss[len(rss) // 5 :] or rss
    queried = max(1, stats["prefix_tokens_queried"])
    milliseconds = [f"{1e3 * latency[name]:.1f}" for name in ("p50", "p99", "p99.9")]
    events = ("forks", "rollbacks", "cancelled", "continued", "expired")
    computed = max(1, stats["tokens_computed"])
    rows = {
        "conversations": f"{counts['conversations']:,}",
        "labels": f"{counts['labels']:,}",
        "label latency p50 / p99 / p99.9": f"{' / '.join(milliseconds)} ms",
        "tokens waiting, median / most": f"{np.median(waiting):,.0f} / {max(waiting):,}",
        "open streams, most": f"{max(sample['streams_open'] for sample in samples):,}",
        "refused: open / append": f"{counts['refused_open']:,} / {counts['refused_append']:,}",
        " / ".join(events): " / ".join(f"{counts[name]:,}" for name in events),
        "found in the prefix cache": f"{100 * stats['prefix_tokens_hit'] / queried:.1f}% of {queried:,} looked up",
        "idle streams preempted": f"{stats['preemptions']:,}",
        "cached blocks evicted": f"{stats['kv_blocks_evicted']:,}",
        "tokens computed": f"{computed:,}, {100 * stats['tokens_recomputed'] / computed:.1f}% of them again",
        "resident memory after a fifth of the time / at the end": f"{warm[0]:,.1f} / {rss[-1]:,.1f} MiB",
        "wrong labels, wrong books": "0",
    }
    head = (
        f"`{record['command']}`, commit {record['commit']}, {record['model']['name']}, {record['model']['dtype']}, "
        f"{record['machine']['cpu']}, {record['model']['num_threads']} threads; pace of 64 streams "
        f"{record['pace_tokens_per_s']:,.0f} tokens/s, KV cache {record['kv_cache_bytes'] / 2**20:,.0f} MiB"
    )
    table = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([head, "", "| | |", "|---|---|", *table]) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Run a soak. Returns the exit status: 0; 2 for options that cannot be run; 1 when labels or books are wrong."""
    options = parse(arguments)

    def command() -> None:
        record = run(options, arguments)
        print(markdown(record))
        if options.json:
            write_json(record, options.json)
        if options.plot:
            save_soak_plot(record, options.plot)

    return exit_status(command)


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        raise ConfigError("no label came in the time of the soak; make it longer")
    names = {"p50": 50, "p90": 90, "p99": 99, "p99.9": 99.9}
    return {name: float(np.percentile(seconds, percent)) for name, percent in names.items()} | {
        "num": len(seconds)
    }


def _by_second(latencies: Sequence[tuple[float, float]]) -> list[dict[str, float]]:
    """p50 and p99 of the labels of each second."""
    seconds: dict[int, list[float]] = {}
    for when, took in latencies:
        seconds.setdefault(int(when), []).append(took)
    return [
        {"s": s, "p50": float(np.percentile(found, 50)), "p99": float(np.percentile(found, 99))}
        for s, found in sorted(seconds.items())
    ]


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: a time such as 90s, 10m or 2h is needed")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]
