"""Pictures of a record: latency against context, throughput against streams. Only measured points are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guardengine.bench.compare import ENGINE, RELEASED
from guardengine.bench.report import by_point, quoted_incremental
from guardengine.errors import ConfigError
from guardengine.measuring.plots import import_pyplot

_CURVES = (
    (ENGINE, "guardengine", "#1b6ca8", "o"),
    ("incremental", "transformers, KV cache (better attention)", "#d9822b", "s"),
    (RELEASED, "transformers, released behaviour", "#b3282d", "^"),
)
Curves = dict[str, list[tuple[float, float]]]


def latency_curves(record: Mapping[str, Any]) -> Curves:
    """For one stream and each contender: (context in tokens, milliseconds for one token)."""
    curves: Curves = {}
    for (num_streams, context_len, _), rows in by_point(record["compare"]).items():
        if num_streams == 1:
            for name, row in _chosen(rows).items():
                curves.setdefault(name, []).append((context_len, row["ms_per_token"]))
    if not curves:
        curves[ENGINE] = [
            (row["context_len"], 1e3 / row["tokens_per_s"])
            for row in record["throughput"]
            if row["num_streams"] == 1
        ]
    return {name: sorted(points) for name, points in curves.items() if points}


def throughput_curves(record: Mapping[str, Any]) -> tuple[Curves, str]:
    """For each contender: (streams, tokens in a second); and the context at which they were measured.

    From the comparison at the context with most stream counts, so that all curves show the same workload; without a
    comparison, from the throughput rows.
    """
    contexts: dict[tuple[int, int], list[tuple[int, Sequence[Mapping[str, Any]]]]] = {}
    for (num_streams, context_len, k), rows in by_point(record["compare"]).items():
        contexts.setdefault((context_len, k), []).append((num_streams, rows))
    curves: Curves = {}
    if not contexts and not record["throughput"]:
        return {}, "nothing measured"
    if not contexts:
        curves[ENGINE] = [(row["num_streams"], row["tokens_per_s"]) for row in record["throughput"]]
        return curves, f"context {record['throughput'][0]['context_len']}"
    (context_len, _), groups = max(contexts.items(), key=lambda item: len(item[1]))
    for num_streams, group in groups:
        for name, row in _chosen(group).items():
            curves.setdefault(name, []).append((num_streams, row["tokens_per_s"]))
    return {name: sorted(points) for name, points in curves.items()}, f"context {context_len}"


def save_plot(record: Mapping[str, Any], path: Path) -> None:
    """Write the picture; the suffix of the file decides the format. Raises ConfigError."""
    pyplot = import_pyplot()
    curves, context = throughput_curves(record)
    if not curves:
        raise ConfigError(f"{path} is not drawn: no point was measured; raise --time-limit")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    _draw(left, latency_curves(record), "context, tokens", "time per token, ms", "Latency, one stream")
    _draw(right, curves, "streams", "tokens per second", f"Throughput, {context}")
    _save(pyplot, figure, record, path)


def save_soak_plot(record: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a soak: latency, waiting tokens and open streams, memory. Raises ConfigError."""
    pyplot = import_pyplot()
    figure, (top, middle, bottom) = pyplot.subplots(3, 1, figsize=(10, 9), sharex=True, layout="constrained")
    seconds = [row["s"] for row in record["latencies"]]
    for name, color in (("p50", "#1b6ca8"), ("p99", "#d9822b")):
        top.plot(seconds, [1e3 * row[name] for row in record["latencies"]], label=name, color=color, lw=0.8)
    top.set_yscale("log")
    top.set_ylabel("label latency, ms")
    samples = record["samples"]
    times = [row["s"] for row in samples]
    for name, label, color in (
        ("streams_open", "open streams", "#1b6ca8"),
        ("tokens_waiting", "tokens waiting", "#d9822b"),
    ):
        middle.plot(times, [row[name] for row in samples], label=label, color=color, lw=0.8)
    for name, label, color in (
        ("preemptions", "idle streams preempted", "#b3282d"),
        ("kv_blocks_evicted", "cached blocks evicted", "#777777"),
    ):
        bottom.plot(times, [row[name] for row in samples], label=label, color=color, lw=0.8)
    bottom.set_ylabel("since the start")
    memory = bottom.twinx()
    memory.plot(times, [row["rss_mb"] for row in samples], label="resident memory", color="#2e7d32", lw=1.2)
    memory.set_ylabel("resident memory, MiB")
    memory.set_ylim(bottom=0)
    memory.legend(fontsize=9, loc="lower right")
    bottom.set_xlabel("seconds")
    for axes in (top, middle, bottom):
        axes.legend(fontsize=9, loc="upper left")
        axes.grid(visible=True, alpha=0.3)
    _save(pyplot, figure, record, path)


def _save(pyplot: Any, figure: Any, record: Mapping[str, Any], path: Path) -> None:
    model, here = record["model"], record["machine"]
    figure.suptitle(
        f"{model['name']}, {model['dtype']}, {here['cpu']}, {model['num_threads']} threads", fontsize=11
    )
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be written ({error}); give a .png, .svg or .pdf file") from error
    finally:
        pyplot.close(figure)


def _chosen(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """One row for each curve; of the incremental contenders the faster."""
    chosen = {row["contender"]: row for row in rows if row["contender"] in (ENGINE, RELEASED)}
    quoted = quoted_incremental(rows)
    return chosen | ({"incremental": quoted} if quoted else {})


def _draw(axes: Any, curves: Curves, x_label: str, y_label: str, title: str) -> None:
    for name, label, color, marker in _CURVES:
        if points := curves.get(name):
            axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker)
    ticks = sorted({x for points in curves.values() for x, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    values = sorted(y for points in curves.values() for _, y in points)
    if values:
        y_ticks = _round_ticks(values[0], values[-1])
        axes.set_yticks(y_ticks)
        axes.set_ylim(min(y_ticks[0], values[0] / 1.3), max(y_ticks[-1], values[-1] * 1.3))
        axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
        axes.legend(fontsize=9, loc="best", framealpha=0.6)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.grid(visible=True, alpha=0.3)


def _round_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from below the lowest value to above the highest."""
    ticks = [step * 10.0**power for power in range(-6, 13) for step in (1, 2, 5)]
    below = max((tick for tick in ticks if tick < low), default=ticks[0])
    above = min((tick for tick in ticks if tick > high), default=ticks[-1])
    return [tick for tick in ticks if below <= tick <= above]
