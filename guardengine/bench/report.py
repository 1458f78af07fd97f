"""The record of a benchmark as JSON, and Markdown tables made from it. Measures nothing."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from guardengine.bench.compare import ENGINE, INCREMENTAL, RELEASED
from guardengine.measuring import machine
from guardengine.measuring.files import markdown_table

SCHEMA = 1


def stamp(arguments: Sequence[str], seed: int) -> dict[str, Any]:
    """Where, when and how a record was made: machine, commit, command line, versions, seed."""
    here = machine.machine_stamp()
    try:
        transformers = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        transformers = None
    return {
        "schema": SCHEMA,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "guardengine.bench", *arguments]),
        "commit": here.get("commit"),
        "seed": seed,
        "versions": {
            **{name: here.get(name) for name in ("guardengine", "torch", "numpy", "python")},
            "transformers": transformers,
        },
        "machine": here,
        "load_average": os.getloadavg()[0],  # of the last minute: what other processes do
    }


def markdown(record: Mapping[str, Any]) -> str:
    """The record as text: what was run, then a table for each part."""
    parts = [_heading(record)]
    if record["throughput"]:
        parts.append(_throughput(record["throughput"]))
    if record["left_out"]:
        counts = ", ".join(map(str, record["left_out"]))
        parts.append(f"Left out for want of time: {counts} streams. Raise --time-limit to measure them.")
    if record["compare"]:
        parts.append(_comparison(record["compare"]))
    return "\n\n".join(parts) + "\n"


def quoted_incremental(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row of the faster of transformers' two attentions, which is the one that is quoted."""
    incremental = [row for row in rows if row["contender"].startswith(INCREMENTAL)]
    return min(incremental, key=lambda row: float(row["ms"]["p50"]), default=None)


def by_point(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int, int], list[Mapping[str, Any]]]:
    """Rows of the comparison by (streams, context, k), in the order of measurement."""
    points: dict[tuple[int, int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        points.setdefault((row["num_streams"], row["context_len"], row["k"]), []).append(row)
    return points


def _heading(record: Mapping[str, Any]) -> str:
    model, here, check = record["model"], record["machine"], record["check"]
    state = " (with changes)" if here.get("is_dirty") else ""
    if "skipped" in check:
        checked = f"not checked: {check['skipped']}"
    else:
        checked = (
            f"{check['num_logits']} logits within {check['largest_error']:.1e} of transformers in float32 "
            f"(allowed {check['largest_limit']:.1e})"
        )
    return "\n".join(
        (
            f"**{model['name']}**, {model['quantization'] or model['dtype']} weights, {model['kv_dtype']} KV cache, "
            f"backend {model['backend']} ({model['isa'] or 'torch'}), {model['num_threads']} threads",
            f"- machine: {here['cpu']}, {here['cores']} cores, {here['memory_bytes'] / 2**30:.0f} GiB; "
            f"load average before the start: {record['load_average']:.1f}",
            f"- commit: {record['commit'] or 'unknown'}{state}; "
            + ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version),
            f"- command: `{record['command']}`, seed {record['seed']}, {record['time']}",
            f"- labels: {checked}",
        )
    )


def _throughput(rows: Sequence[Mapping[str, Any]]) -> str:
    first = rows[0]
    fed = (
        "in lockstep"
        if first["arrival"] == "lockstep"
        else f"as they come (Poisson, {first['rate']:g} tokens/s a stream)"
    )
    table = markdown_table(
        (
            "streams",
            "tokens/s",
            "step ms p50 / p90 / p99",
            "label ms p50 / p90 / p99",
            "of floor",
            "prompts tokens/s",
            "of floor",
            "KV MiB",
            "read GB/s",
            "peak GFLOP/s",
        ),
        [
            (
                f"{row['num_streams']}{'*' if row['is_cut_short'] else ''}",
                f"{row['tokens_per_s']:.1f}",
                _three(row["step_ms"]),
                _three(row["label_latency_ms"]),
                f"{row['share_of_floor']:.0%} ({row['floor_bound']})",
                f"{row['prefill_tokens_per_s']:.0f}",
                f"{row['prefill_share_of_floor']:.0%} ({row['prefill_floor_bound']})",
                f"{row['kv_used_bytes'] / 2**20:.0f}",
                f"{row['ceilings']['read_bytes_per_s'] / 1e9:.1f}",
                f"{row['ceilings']['flops_per_s'] / 1e9:.0f}",
            )
            for row in rows
        ],
    )
    return (
        f"### Throughput: {first['context_len']} tokens of context, then {first['response_len']} a stream, "
        f"{first['k']} at a time, {fed}\n\n{table}\n\n"
        "label ms: from a token's arrival to its label. of floor: the least time in which this machine could have "
        "read or computed what the steps need (both ceilings measured beside each row), over the time they took."
        + (" *: cut short by --time-limit." if any(row["is_cut_short"] for row in rows) else "")
    )


def _comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for (num_streams, context_len, k), group in by_point(rows).items():
        quoted = quoted_incremental(group)
        for row in group:
            name = row["contender"].replace("_", " ")
            lines.append(
                (
                    f"{num_streams}",
                    f"{context_len}",
                    f"{k}",
                    f"**{name}**"
                    if row["contender"] == ENGINE
                    else name + (" (quoted)" if row is quoted else ""),
                    f"{row['ms']['p50']:.1f}",
                    f"{row['ms']['p20']:.1f} to {row['ms']['p80']:.1f}",
                    f"{row['tokens_per_s']:.1f}",
                    "" if row["contender"] == ENGINE else f"{row['engine_is_faster_by']:.2f}x",
                )
            )
    table = markdown_table(
        ("streams", "context", "k", "contender", "ms", "ms p20 to p80", "tokens/s", "engine is faster by"),
        lines,
    )
    return (
        f"### Compared with transformers, {rows[0]['rounds']} rounds each, taking turns\n\n{table}\n\n"
        "ms: median time to label the next k tokens of every stream. "
        f"{RELEASED.replace('_', ' ')}: the whole conversation again for every token. "
        f"{INCREMENTAL.replace('_', ' ')}: a DynamicCache a stream, stepped in turn; the better one is quoted."
    )


def _three(percentiles: Mapping[str, float]) -> str:
    return " / ".join(f"{percentiles[name]:.1f}" for name in ("p50", "p90", "p99"))
