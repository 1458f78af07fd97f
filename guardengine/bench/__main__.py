"""`python -m guardengine.bench`: options in, tables and files out.

Without options: random stream-0.6b weights (made once, in the cache folder), the default points, a table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from guardengine.bench import compare, plot, report, throughput
from guardengine.bench.check import check_labels
from guardengine.bench.checkpoints import STREAM_PRESETS, cache_folder, cached_checkpoint
from guardengine.bench.floor import CostModel
from guardengine.bench.gpu import predict
from guardengine.bench.hf import HFGuard, import_transformers
from guardengine.bench.options import count, counts, exit_status, say
from guardengine.bench.soak import run as soak
from guardengine.bench.workload import ArrivalKind, Point
from guardengine.checkpoint.model_config import ModelConfig
from guardengine.engine.engine import Engine
from guardengine.errors import ConfigError
from guardengine.kernels.quantization import SCHEMES
from guardengine.measuring.files import check_writable, write_json
from guardengine.measuring.plots import import_pyplot
from guardengine.runners.cores import memory_bytes
from guardengine.runners.kv_cache import CacheShape

_MODEL_STATS = ("dtype", "quantization", "kv_dtype", "backend", "isa", "device", "num_threads")
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_KV_ITEM_BYTES = {**_ITEM_BYTES, "int8": 1}
_BLOCK_SIZE = 16
_POINT_COST_STREAMS = 16  # the fixed cost of a point, in streams; for sharing out the time
_CHECK_TOKENS = 64  # room for the conversation that is checked first

# For the default points, making the weights included: under 3 minutes on 2 cores, also when they are busy.
_TIME_LIMIT_S = 140.0

# (default, --quick)
_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "streams": ([1, 4, 16, 64], [1, 4]),
    "prompt_len": (64, 32),
    "response_len": (16, 8),
    "contexts": ([64, 256, 1024], [32, 128]),
    "compare_streams": ([4, 16], [4]),
    "rounds": (5, 3),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; argparse exits with status 2 and the reason when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m guardengine.bench",
        description="Measure the engine on this machine. Without options: random stream-0.6b weights, made once in "
        f"{cache_folder()} ($GUARDENGINE_CACHE), and a set of points that takes under 3 minutes on 2 cores.",
        epilog="--predict GPU, with options of its own (--predict GPU --help), tells what a GPU that is not here "
        "should take: a prediction, no measurement.",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--preset", choices=STREAM_PRESETS, default="stream-0.6b", help="random weights (%(default)s)"
    )
    model.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a checkpoint folder instead of a preset"
    )
    model.add_argument(
        "--dtype", choices=("auto", *_ITEM_BYTES), default="auto", help="auto: the checkpoint's"
    )
    model.add_argument("--quantization", choices=SCHEMES, help="of the layers' matrices (none)")
    model.add_argument(
        "--kv-dtype", choices=("auto", *_KV_ITEM_BYTES), default="auto", help="auto: the model's dtype"
    )
    model.add_argument("--backend", default="auto", help="the engine's operators (%(default)s)")
    model.add_argument("--threads", type=count, metavar="N", help="default: torch's choice")
    load = parser.add_argument_group("workload")
    load.add_argument("--streams", type=counts, metavar="N,N,...", help=_help("streams"))
    load.add_argument("--prompt-len", type=count, metavar="TOKENS", help=_help("prompt_len"))
    load.add_argument("--response-len", type=count, metavar="TOKENS", help=_help("response_len"))
    load.add_argument("--k", type=count, default=1, metavar="TOKENS", help="tokens an append (%(default)s)")
    load.add_argument("--arrival", choices=get_args(ArrivalKind), default="lockstep", help="(%(default)s)")
    load.add_argument("--rate", type=float, metavar="R", help="poisson: tokens/s a stream, on average (10)")
    load.add_argument("--seed", type=_seed, default=0, help="of ids and arrivals (%(default)s)")
    load.add_argument(
        "--time-limit",
        type=_seconds,
        metavar="SECONDS",
        help=f"measure throughput no longer than this after the start (default {_TIME_LIMIT_S:g} for the default "
        "points, none for points of your own)",
    )
    load.add_argument("--quick", action="store_true", help="fewer and shorter points")
    other = parser.add_argument_group("comparison")
    other.add_argument(
        "--compare", choices=("hf",), help="hf: also time transformers, taking turns with the engine"
    )
    other.add_argument("--contexts", type=counts, metavar="N,N,...", help=_help("contexts"))
    other.add_argument("--compare-streams", type=counts, metavar="N,N,...", help=_help("compare_streams"))
    other.add_argument("--rounds", type=count, metavar="N", help=_help("rounds"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the whole record")
    output.add_argument("--plot", type=Path, metavar="FILE.png", help="draw latency and throughput")
    options = parser.parse_args(arguments)
    if options.rate is not None and options.arrival != "poisson":
        parser.error("--rate is for --arrival poisson; in lockstep the engine sets the pace")
    if options.compare is None:
        for name in ("contexts", "compare_streams", "rounds"):
            if getattr(options, name) is not None:
                parser.error(f"--{name.replace('_', '-')} is for --compare hf")
    if options.time_limit is None:
        has_own_points = any((options.streams, options.prompt_len, options.response_len))
        options.time_limit = math.inf if has_own_points else _TIME_LIMIT_S
    for name, (default, quick) in _DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else default)
    options.rate = 10.0 if options.rate is None else options.rate
    return options


def run(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Measure what the options ask for. Returns the record. Raises GuardEngineError."""
    deadline = time.perf_counter() + options.time_limit
    for path in (options.json, options.plot):
        if path is not None:
            check_writable(path)
    if options.plot is not None:
        import_pyplot()
    if options.compare:
        import_transformers()
    if options.threads:
        torch.set_num_threads(options.threads)  # for transformers; the engine has an option for this
    points = [
        Point(count, options.prompt_len, options.response_len, options.k, options.arrival, options.rate)
        for count in options.streams
    ]
    pairs = []
    if options.compare:
        pairs = compare.compare_points(options.contexts, options.compare_streams, options.k)
    folder = options.checkpoint or cached_checkpoint(options.preset)
    config = _model_config(folder)
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if config.dtype == "bfloat16" else "float32"
    kv_dtype = dtype if options.kv_dtype == "auto" else options.kv_dtype
    cost = CostModel(config, 1 if options.quantization else _ITEM_BYTES[dtype], _KV_ITEM_BYTES[kv_dtype])
    needs = [(point.num_streams, throughput.tokens_per_stream(point)) for point in points]
    needs += [(pair.num_streams, compare.tokens_per_stream(pair, options.rounds)) for pair in pairs]
    record = report.stamp(arguments, options.seed)
    with Engine.from_pretrained(
        folder,
        dtype=dtype,
        quantization=options.quantization,
        kv_dtype=options.kv_dtype,
        backend=options.backend,
        progress=True,
        kv_cache_bytes=_kv_cache_bytes(config, cost, getattr(torch, kv_dtype), needs),
        max_num_streams=max(count for count, _ in needs),
        block_size=_BLOCK_SIZE,
        num_threads=options.threads,
    ) as engine:
        stats = engine.stats()
        say("checking the labels against transformers")
        record["check"] = check_labels(
            engine,
            folder,
            vocab_size=config.vocab_size,
            dtype=dtype,
            is_quantized=options.quantization is not None or kv_dtype == "int8",
            seed=options.seed,
            num_weights=cost.num_weights,
        )
        record["model"] = {
            "name": options.checkpoint.name if options.checkpoint else f"{options.preset} (random weights)",
            "path": str(folder),
            **{key: stats[key] for key in _MODEL_STATS},
        }
        record["options"] = {
            key: str(value) if isinstance(value, Path) or value == math.inf else value
            for key, value in vars(options).items()
        }
        record["throughput"] = _measure(engine, points, cost, config.vocab_size, options.seed, deadline)
        measured = {row["num_streams"] for row in record["throughput"]}
        record["left_out"] = [point.num_streams for point in points if point.num_streams not in measured]
        record["compare"] = (
            _compare(engine, folder, dtype, pairs, config.vocab_size, options) if pairs else []
        )
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit status: 0; 2 for options that cannot be run; 1 when the labels are wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for option, other_main in (("--predict", predict.main), ("--soak", soak.main)):
        if any(argument.partition("=")[0] == option for argument in arguments):
            return other_main(arguments)
    options = parse(arguments)

    def command() -> None:
        record = run(options, arguments)
        print(report.markdown(record))
        if options.json:
            write_json(record, options.json)
        if options.plot:
            plot.save_plot(record, options.plot)

    return exit_status(command)


def _measure(
    engine: Engine, points: Sequence[Point], cost: CostModel, vocab_size: int, seed: int, deadline: float
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    total = sum(point.num_streams * throughput.tokens_per_stream(point) for point in points)
    with tqdm(total=total, desc="throughput", unit="token", mininterval=1) as bar:
        for index, point in enumerate(points):
            bar.set_postfix_str(f"{point.num_streams} streams")
            row = None
            now = time.perf_counter()
            # Points share the remaining time by their size; a fast one leaves more to the next.
            sizes = [_POINT_COST_STREAMS + other.num_streams for other in points[index:]]
            own = now + max(0.0, deadline - now) * sizes[0] / sum(sizes)
            prompts_s = (
                point.num_streams * point.prompt_len / rows[-1]["prefill_tokens_per_s"] if rows else 0.0
            )
            if now + prompts_s < own:
                row = throughput.measure_point(
                    engine,
                    point,
                    cost,
                    vocab_size=vocab_size,
                    seed=seed,
                    progress=bar.update,
                    deadline=own,
                )
            rows += [row] if row else []
    return rows


def _compare(
    engine: Engine,
    folder: Path,
    dtype: str,
    pairs: Sequence[compare.ComparePoint],
    vocab_size: int,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    guard = HFGuard(folder, dtype=getattr(torch, dtype))
    rows = []
    with tqdm(total=compare.num_measurements(pairs, options.rounds), desc="comparison", mininterval=1) as bar:
        comparison = compare.Comparison(engine, guard, vocab_size, options.seed, options.rounds, bar.update)
        for pair in pairs:
            bar.set_postfix_str(f"{pair.num_streams} streams, context {pair.context_len}")
            rows += comparison.run(pair)
    return rows


def _model_config(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    try:
        config = ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); --checkpoint takes a checkpoint folder"
        ) from error
    if config.heads is None:
        raise ConfigError(f"{folder} is a Gen checkpoint; the benchmark runs Stream checkpoints")
    return config


def _kv_cache_bytes(
    config: ModelConfig, cost: CostModel, kv_dtype: torch.dtype, needs: Sequence[tuple[int, int]]
) -> int:
    longest = max(length for _, length in needs)
    if longest > config.max_position_embeddings:
        raise ConfigError(
            f"a stream would come to {longest} tokens (prompt, {throughput.WARM_UP_TOKENS} to warm up, response), "
            f"the model takes {config.max_position_embeddings}; shorten --prompt-len, --response-len or --contexts"
        )
    # The conversation of the check runs before them, alone.
    blocks = max(count * -(-max(length, _CHECK_TOKENS) // _BLOCK_SIZE) for count, length in needs)
    needed = CacheShape(blocks, _BLOCK_SIZE, kv_dtype).num_bytes(config)
    free = memory_bytes("MemAvailable")
    if needed + cost.num_weights * cost.weight_bytes > free:
        raise ConfigError(
            f"the KV cache for these streams takes {needed / 1e9:.1f} GB beside the weights, {free / 1e9:.1f} GB are "
            "free; use fewer --streams or shorter ones"
        )
    return needed


def _help(name: str) -> str:
    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    default, quick = _DEFAULTS[name]
    return f"default {text(default)}; with --quick {text(quick)}"


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of seconds above 0 is needed")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 0 to {2**32 - 1} is needed")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
