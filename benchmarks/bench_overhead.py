"""What the engine costs apart from the model, and what reuse saves.

    python benchmarks/bench_overhead.py                    # host work of a step, of an open, of a close; lifetimes
    python benchmarks/bench_overhead.py --preset stream-0.6b --parts crowd,prefix     # with a model

host       a runner that answers at once stands in for the model: 64 of 2,000 open streams get a token a step. Times
           of the parts are taken by wrapping their functions, and what the wrapping costs is taken off.
lifetimes  open / append / step / close again and again with that runner: memory and books after a million.
crowd      the model's steps for 64 streams, alone and with 1,936 idle ones beside them, taking turns.
prefix     the first label of the next turn of a long conversation that is opened again, with and without prefix reuse.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from guardengine import Engine, EngineConfig
from guardengine.bench.checkpoints import STREAM_PRESETS, cached_checkpoint
from guardengine.core import pipeline
from guardengine.core.block_pool import BlockPool
from guardengine.core.engine_core import EngineCore
from guardengine.core.prefix_cache import PrefixCache
from guardengine.core.readout import Readout
from guardengine.measuring import machine
from guardengine.measuring.files import markdown_table
from guardengine.runners.batch import Batch
from guardengine.runners.runner import Computed, Scores

NUM_OPEN, NUM_ACTIVE, BLOCK_SIZE = 2000, 64, 16


class InstantRunner:
    """Answers every batch at once, with the same numbers."""

    max_in_flight = 1

    def __init__(self, engine: Engine) -> None:
        self.inner = engine.core.runner
        heads = engine._heads
        self._logits = np.zeros((1, heads.num_logits), np.float32)
        self._logits[:, 0] = 9  # the first class: "Safe"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def launch(self, batch: Batch) -> Computed:
        return Computed(Scores(self._logits.repeat(len(batch.label_index), axis=0)))

    def copy_block(self, source: int, destination: int) -> None:
        pass

    def close(self) -> None:
        self.inner.close()


def instant_engine(num_blocks: int) -> Engine:
    """An engine whose model takes no time."""
    folder = cached_checkpoint("stream-tiny")
    loaded = Engine.from_pretrained(folder, kv_cache_bytes=2**20)
    options = EngineConfig.from_options({"max_num_streams": 2 * NUM_OPEN})
    core = EngineCore(
        loaded.core.runner.info.config,
        InstantRunner(loaded),
        Readout(loaded._heads),
        BlockPool(num_blocks, BLOCK_SIZE, PrefixCache(BLOCK_SIZE)),
        options,
        loaded.core.max_model_len,
        loaded.core.fingerprint,
    )
    return Engine(core, None, loaded._heads)


class Stopwatch:
    """Adds up the time in wrapped functions, without what the wrapping takes."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._cost = 0.0
        self.nothing = lambda: None
        self.wrap(self, "nothing", "")
        for _ in range(1000):
            self.nothing()
        self._cost = self.seconds[""] / 1000

    def wrap(self, owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds[part] += time.perf_counter() - began - self._cost  # type: ignore[assignment]

        setattr(owner, name, timed)


def ids(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=count)


def open_streams(engine: Engine, count: int, length: int) -> list[Any]:
    streams = []
    for seed in range(count):
        streams.append(engine.open(token_ids=ids(length, seed)))
        if len(streams) % 32 == 0:
            engine.run()
    engine.run()
    return streams


def median_us(call: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def bench_host(rounds: int) -> dict[str, float]:
    """Microseconds: of whole steps with their appends, of each part in a step, of opening and closing."""
    engine = instant_engine(num_blocks=NUM_OPEN * 8)
    streams = open_streams(engine, NUM_OPEN, 66)
    active = streams[:: NUM_OPEN // NUM_ACTIVE][:NUM_ACTIVE]

    def turn() -> None:
        for stream in active:
            stream.append([7])
        engine.step()

    def round_of(call: Callable[[], Any]) -> Callable[[], Any]:
        def once() -> None:
            turn_rollback()
            call()

        return once

    def turn_rollback() -> None:
        if len(active[0].token_ids) > 250:
            for stream in active:
                stream.rollback(180)

    result: dict[str, float] = {}
    gc.collect()
    turn()
    result["step with 64 appends"] = median_us(round_of(turn), rounds)
    appends, steps = [], []
    for _ in range(rounds):
        turn_rollback()
        began = time.perf_counter()
        for stream in active:
            stream.append([7])
        middle = time.perf_counter()
        engine.step()
        appends.append(middle - began)
        steps.append(time.perf_counter() - middle)
    result["64 appends"] = 1e6 * statistics.median(appends)
    result["step"] = 1e6 * statistics.median(steps)

    def open_short() -> Any:
        return engine.open(token_ids=[1, 2, 3, 4, 5, 6, 7, 8], role="assistant")

    opens, closes = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        stream = open_short()
        opens.append(time.perf_counter() - began)
        engine.run()
        began = time.perf_counter()
        stream.close()
        closes.append(time.perf_counter() - began)
    result["open"], result["close"] = 1e6 * statistics.median(opens), 1e6 * statistics.median(closes)

    watch, core = Stopwatch(), engine.core
    for name in ("schedule", "finish", "update"):
        watch.wrap(core.scheduler, name, "scheduler")
    for name in ("allocate", "publish"):
        watch.wrap(core.residency, name, "block pool and prefix cache")
    for name in ("check_pending", "update"):
        watch.wrap(core.admission, name, "admission")
    for name in ("probabilities", "labels"):
        watch.wrap(core.readout, name, "readout")
    watch.wrap(core, "check_token_ids", "token ids")
    plain = pipeline.build_batch
    watch.wrap(pipeline, "build_batch", "batch")
    parts: dict[str, list[float]] = {}
    for _ in range(rounds):
        turn_rollback()
        watch.seconds.clear()
        turn()
        for part, seconds in watch.seconds.items():
            parts.setdefault(part, []).append(1e6 * seconds)
    pipeline.build_batch = plain
    result |= {f"in it: {part}": statistics.median(times) for part, times in parts.items()}
    both = [sum(pair) for pair in zip(parts["scheduler"], parts["block pool and prefix cache"], strict=True)]
    result["in it: scheduler + pool"], result["the same, fastest"] = statistics.median(both), min(both)
    engine.check_integrity()
    return result


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def bench_lifetimes(count: int) -> dict[str, float]:
    """Streams that come and go, 32 at a time; half of the prompts are found in the cache."""
    engine = instant_engine(num_blocks=2048)
    warm_up, samples = min(count // 5, 50_000), []
    began = time.perf_counter()
    for number in range(0, count, 32):
        streams = []
        for index in range(number, number + 32):
            prompt = [index % 2 * (index % 1000), *range(20)]
            streams.append(engine.open(token_ids=prompt, timeout_s=3600.0))
        engine.step()
        for stream in streams:
            stream.append([5, 6, 7], timeout_s=3600.0)
        engine.run()
        for stream in streams:
            stream.close()
        if (number >= warm_up and number // 32 % 100 == 0) or number + 32 >= count:
            samples.append(resident_bytes())
    seconds = time.perf_counter() - began
    engine.check_integrity()
    stats = engine.stats()
    if (stats["streams_open"], stats["kv_blocks_free"]) != (0, stats["kv_blocks_total"]):
        raise SystemExit(f"books after {count} lifetimes: {stats}")
    return {
        "lifetimes": stats["streams_opened"],
        "us a lifetime": 1e6 * seconds / stats["streams_opened"],
        "RSS MB after warm-up": samples[0] / 1e6,
        "RSS MB at the end": samples[-1] / 1e6,
        "growth MB": (max(samples) - samples[0]) / 1e6,
    }


def bench_crowd(folder: Path, rounds: int, context: int = 66) -> dict[str, float]:
    """Steps of 64 streams with a token each; both engines take turns."""
    engines = []
    for num_open in (NUM_ACTIVE, NUM_OPEN):
        engine = Engine.from_pretrained(
            folder, max_num_streams=NUM_OPEN, kv_cache_bytes=_cache_bytes(folder, NUM_ACTIVE, context + 100)
        )
        idle = num_open - NUM_ACTIVE
        active = open_streams(engine, NUM_ACTIVE, context)
        if idle:
            branches = [active[0].fork() for _ in range(idle)]  # without computing a crowd's prompts
            assert len(branches) + NUM_ACTIVE == engine.stats()["streams_open"]
        engines.append((engine, active))
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for (engine, active), mine in zip(engines, times, strict=True):
            began = time.perf_counter()
            for stream in active:
                stream.append([7])
            engine.step()
            mine.append(1e3 * (time.perf_counter() - began))
    alone, crowd = map(statistics.median, times)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    for engine, _ in engines:
        engine.check_integrity()
        engine.close()
    return {
        "64 alone, ms": alone,
        "64 with 2,000 open, ms": crowd,
        "ratio, median of rounds": statistics.median(ratios),
    }


def bench_prefix(folder: Path, rounds: int, context: int = 1000, turn: int = 24) -> dict[str, float]:
    """From `open` of a conversation with one more turn to that turn's label."""
    result: dict[str, list[float]] = {}
    engines = {
        name: Engine.from_pretrained(
            folder, prefix_caching=flag, kv_cache_bytes=_cache_bytes(folder, 2 + rounds, context + turn + 16)
        )
        for name, flag in (("with reuse", True), ("without", False))
    }
    conversation = ids(context, 1)
    for engine in engines.values():
        with engine.open(token_ids=conversation):
            engine.run()
    for number in range(rounds):
        for name, engine in engines.items():
            began = time.perf_counter()
            with engine.open(token_ids=[*conversation, *ids(turn, 100 + number)]) as stream:
                while stream.prompt_label is None:
                    engine.step()
                result.setdefault(name, []).append(1e3 * (time.perf_counter() - began))
    for engine in engines.values():
        engine.close()
    ratios = [b / a for a, b in zip(result["with reuse"], result["without"], strict=True)]
    return {
        **{f"{name}, ms": statistics.median(times) for name, times in result.items()},
        "ratio, median of rounds": statistics.median(ratios),
    }


def _cache_bytes(folder: Path, num_streams: int, length: int) -> int:
    config = json.loads((folder / "config.json").read_text())
    item = 4 if "float32" in str(config.get("torch_dtype", config.get("dtype"))) else 2
    token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * item
    return num_streams * -(-length // BLOCK_SIZE) * BLOCK_SIZE * token


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="host,lifetimes", help="of host, lifetimes, crowd, prefix")
    parser.add_argument("--preset", choices=STREAM_PRESETS, default="stream-0.6b", help="of crowd and prefix")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--lifetimes", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    record: dict[str, Any] = {"machine": machine.machine_stamp(), "command": sys.argv[1:]}
    for part in options.parts.split(","):
        if part == "host":
            found = bench_host(options.rounds)
        elif part == "lifetimes":
            found = bench_lifetimes(options.lifetimes)
        elif part in ("crowd", "prefix"):
            measure = bench_crowd if part == "crowd" else bench_prefix
            found = measure(cached_checkpoint(options.preset), options.rounds)
        else:
            parser.error(f"part {part!r}: choose from host, lifetimes, crowd, prefix")
        record[part] = found
        print(markdown_table((part, ""), [(name, f"{value:,.2f}") for name, value in found.items()]))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
