"""`python -m guardengine.bench --predict GPU`: predicts the time of a step on a GPU that this machine does not have.

It is a PREDICTION: bytes, multiplications and launches are counted (count.py), but the speed at which a GPU does them
is assumed. Every assumption is printed and can be changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from guardengine.bench.floor import CostModel, Limits, Work
from guardengine.bench.gpu.devices import GPU, GPUS
from guardengine.bench.options import count, counts, exit_status
from guardengine.checkpoint.model_config import ModelConfig
from guardengine.checkpoint.random_weights import preset_config
from guardengine.errors import ConfigError
from guardengine.kernels import SMALL_ROWS
from guardengine.measuring.files import check_writable, markdown_table, write_json
from guardengine.runners.accelerator import check_triton

MODELS = {"0.6b": "stream-0.6b", "4b": "stream-4b", "8b": "stream-8b"}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_MEMORY_SHARE = 0.9  # of the GPU's, for weights and KV cache


@dataclass(frozen=True, slots=True)
class Assumptions:
    """The numbers that cannot be counted. Bandwidth, gaps and the times of the host are fitted to steps of the 0.6B
    model measured on an H100 with a Xeon (docs/speed/h100.md); those of L2 and multiplications are guesses from
    published measurements of other engines."""

    bandwidth_share: float = 0.85  # of the peak, while a kernel streams
    l2_speed: float = 2.5  # bandwidth of L2 over the memory's peak
    flops_share: float = 0.5  # of the peak, at 16 or 32 rows a tile
    gap_us: float = 5.0  # of each of a graph's kernels: it fills, drains, adds up its parts
    step_us: float = 450.0  # of the host and the bus a step, each of which is waited for before the next
    stream_us: float = 18.0  # of the host a stream and step: its place in the batch, its label, its policy


@dataclass(frozen=True, slots=True)
class Prediction:
    """The prediction for one step: `streams` streams with `k` new tokens each after `context` tokens."""

    streams: int
    k: int
    context: int
    floor_ms: float  # weights and keys once over the peak bandwidth, or multiplications over the peak
    floor_bound: str
    step_ms: float
    tokens_per_s: float
    num_launches: int
    memory_bytes: float
    minimum_bytes: float
    l2_bytes: float
    kv_bytes: float
    fits: bool


def predict(
    gpu: GPU,
    config: ModelConfig,
    dtype: str,
    kv_dtype: str,
    shape: tuple[int, int, int],
    assumed: Assumptions,
) -> Prediction:
    """Predict one step.  shape: streams, k, context."""
    from guardengine.bench.gpu.count import Counter, Shape

    streams, k, context = shape
    step = Counter(config, dtype, kv_dtype, gpu).step(Shape(streams, k, context))
    cost = CostModel(config, _ITEM_BYTES[dtype], _ITEM_BYTES[kv_dtype])
    least = cost.of_tokens([range(context - k, context)] * streams)
    floor_s, bound = Limits(gpu.bytes_per_s, gpu.flops(dtype)).seconds(least)
    bandwidth = gpu.bytes_per_s * assumed.bandwidth_share
    flops = gpu.flops(dtype) * assumed.flops_share
    l2 = gpu.bytes_per_s * assumed.l2_speed
    device_s = sum(
        max(
            launch.memory_bytes / bandwidth,
            (launch.memory_bytes + launch.l2_bytes) / l2,
            launch.flops / flops,
        )
        for launch in step.launches
    )
    num_launches = len(step.launches)
    step_s = device_s + num_launches * assumed.gap_us / 1e6
    step_s += (assumed.step_us + streams * assumed.stream_us) / 1e6
    kv = streams * -(-context // 16) * 16 * cost.kv_bytes_per_token
    weights = cost.num_weights * _ITEM_BYTES[dtype]
    return Prediction(
        streams,
        k,
        context,
        floor_s * 1e3,
        bound,
        step_s * 1e3,
        streams * k / step_s,
        num_launches,
        step.memory_bytes,
        least.num_bytes,
        step.l2_bytes,
        kv,
        weights + kv <= gpu.memory_bytes * _MEMORY_SHARE,
    )


def streams_at_rate(
    gpu: GPU,
    config: ModelConfig,
    dtype: str,
    kv_dtype: str,
    k: int,
    context: int,
    rate: float,
    assumed: Assumptions,
) -> int:
    """The largest number of streams, each with `rate` tokens a second appended k at a time, for which steps keep up
    and memory suffices."""

    def keeps_up(streams: int) -> bool:
        found = predict(gpu, config, dtype, kv_dtype, (streams, k, context), assumed)
        return found.fits and found.step_ms / 1e3 <= k / rate

    if not keeps_up(1):
        return 0
    low, high = 1, 2
    while high <= 2**16 and keeps_up(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if keeps_up(middle) else (low, middle)
    return low


def weights_floor_ms(gpu: GPU, config: ModelConfig) -> float:
    """The time to read the layers' weights in bfloat16 once."""
    none = CostModel(config, 2, 2).of_tokens([])
    heads = config.heads
    classifiers = heads.inner_size * (2 * config.hidden_size + heads.num_logits) if heads else 0
    return (
        Limits(gpu.bytes_per_s, gpu.bf16_flops).seconds(Work(none.num_bytes - 2 * classifiers, 0.0))[0] * 1e3
    )


def main(arguments: Sequence[str]) -> int:
    """Predict. Returns the exit status: 0, or 2 for options that cannot be predicted."""
    options = _parse(arguments)

    def command() -> None:
        if options.json:
            _check_output(options.json)
        record = run(options)
        print(text(record))
        if options.json:
            write_json(record, options.json)

    return exit_status(command)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Predict what the options ask for; returns the record."""
    check_triton()
    gpu, config = GPUS[options.predict], preset_config(MODELS[options.model])
    kv_dtype = options.dtype if options.kv_dtype == "auto" else options.kv_dtype
    assumed = Assumptions(**{field.name: getattr(options, field.name) for field in fields(Assumptions)})
    for context in options.context:
        if not options.k <= context <= config.max_position_embeddings:
            raise ConfigError(
                f"--context {context}: from k={options.k} to {config.max_position_embeddings} tokens are possible"
            )
    shapes = [(streams, options.k, context) for context in options.context for streams in options.streams]
    return {
        "kind": "PREDICTION, not a measurement",
        "gpu": asdict(gpu),
        "model": {"name": MODELS[options.model], "dtype": options.dtype, "kv_dtype": kv_dtype},
        "assumptions": asdict(assumed),
        "weights_floor_ms": weights_floor_ms(gpu, config),
        "steps": [asdict(predict(gpu, config, options.dtype, kv_dtype, shape, assumed)) for shape in shapes],
        "rate": options.rate,
        "streams_at_rate": [
            {
                "context": context,
                "k": options.k,
                "streams": streams_at_rate(
                    gpu, config, options.dtype, kv_dtype, options.k, context, options.rate, assumed
                ),
            }
            for context in options.context
        ],
    }


def text(record: dict[str, Any]) -> str:
    """The record as text."""
    gpu, model, assumed = record["gpu"], record["model"], record["assumptions"]
    table = markdown_table(
        (
            "context", "streams", "k", "floor ms", "predicted ms", "of floor", "tokens/s", "launches", "MB", "of least",
            "L2 MB", "KV GB",
        ),
        [
            (
                f"{row['context']}",
                f"{row['streams']}",
                f"{row['k']}",
                f"{row['floor_ms']:.3f} ({row['floor_bound']})",
                f"{row['step_ms']:.2f}",
                f"{row['floor_ms'] / row['step_ms']:.0%}",
                f"{row['tokens_per_s']:.0f}",
                f"{row['num_launches']}",
                f"{row['memory_bytes'] / 1e6:.0f}",
                f"{row['memory_bytes'] / row['minimum_bytes']:.2f}x",
                f"{row['l2_bytes'] / 1e6:.0f}",
                f"{row['kv_bytes'] / 1e9:.1f}" + ("" if row["fits"] else " (does not fit)"),
            )
            for row in record["steps"]
        ],
    )  # fmt: skip
    rates = "\n".join(
        f"- {row['streams']} streams of {record['rate']:g} tokens/s each, {row['k']} at a time, with {row['context']} "
        "tokens of context"
        for row in record["streams_at_rate"]
    )
    return f"""PREDICTION, not a measurement: {model["name"]} in {model["dtype"]} on {gpu["name"]}

{table}

Floor: weights, keys and values once over {gpu["bytes_per_s"] / 1e12:g} TB/s, or multiplications over
{gpu["bf16_flops"] / 1e12:g} TFLOP/s (bfloat16), whichever is longer ({gpu["source"]}).
The layers' weights alone in bfloat16: {record["weights_floor_ms"]:.2f} ms.
MB: counted from the kernels' own tiles and plans, with all activations, attention's partial sums and the upload; of
least: over weights, keys and values once. L2 MB: what tiles read again, and a product's partial sums where its launch
fits into L2.
Steps of more than {SMALL_ROWS} rows multiply with cuBLAS.

Assumed, from steps of 0.6B on one H100: {assumed["bandwidth_share"]:.0%} of the bandwidth and
{assumed["flops_share"]:.0%} of the multiplications while a kernel runs, an L2 {assumed["l2_speed"]:g} times as fast as
the memory, {assumed["gap_us"]:g} us for each kernel to fill and drain, {assumed["step_us"]:g} us a step and
{assumed["stream_us"]:g} us a stream for the host, which in these steps waits for the device and the device for it. Each
has an option.

At most, within {_MEMORY_SHARE:.0%} of {gpu["memory_bytes"] / 1e9:g} GB:
{rates}
"""


def _check_output(path: Path) -> None:
    """Raise ConfigError for a file that cannot be written, or that is in the folder of measurements."""
    check_writable(path)
    folder = path.resolve().parent
    if folder.name == "results" or "benchmarks" in folder.parts:
        raise ConfigError(
            f"--json {path}: predictions are not kept among measurements; choose another folder"
        )


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m guardengine.bench",
        description="Predict a step's time on a GPU that is not here, from counted work and stated assumptions.",
    )
    assumed = Assumptions()
    parser.add_argument("--predict", choices=sorted(GPUS), required=True, metavar="GPU", help=", ".join(GPUS))
    parser.add_argument("--model", choices=MODELS, default="0.6b", help="(%(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(%(default)s)")
    parser.add_argument(
        "--kv-dtype", choices=("auto", "int8"), default="auto", help="auto: the model's dtype"
    )
    parser.add_argument("--streams", type=counts, default=[1, 4, 16, 64, 256], metavar="N,N,...")
    parser.add_argument("--context", type=counts, default=[256, 2048, 8192], metavar="N,N,...")
    parser.add_argument("--k", type=count, default=1, metavar="TOKENS", help="new tokens a step and stream")
    parser.add_argument("--rate", type=_positive, default=50.0, help="tokens/s of a stream (%(default)g)")
    parser.add_argument("--bandwidth-share", type=_share, default=assumed.bandwidth_share)
    parser.add_argument("--l2-speed", type=_positive, default=assumed.l2_speed)
    parser.add_argument("--flops-share", type=_share, default=assumed.flops_share)
    parser.add_argument("--gap-us", type=_positive, default=assumed.gap_us)
    parser.add_argument("--step-us", type=_positive, default=assumed.step_us)
    parser.add_argument("--stream-us", type=_positive, default=assumed.stream_us)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record, marked as a prediction")
    return parser.parse_args(arguments)


def _positive(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e9:
        raise argparse.ArgumentTypeError(f"{value!r}: give a number above 0")
    return number


def _share(value: str) -> float:
    number = _positive(value)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{value!r}: give a share from 0 to 1")
    return number
