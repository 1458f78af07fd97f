"""From turns to rows, and from rows to a Markdown table. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from contenders import Contender
from points import name_point
from rounds import Turns

from guardengine.bench.compare import ComparePoint
from guardengine.bench.floor import CostModel, Limits, Work
from guardengine.checkpoint.model_config import ModelConfig
from guardengine.measuring.files import markdown_table
from guardengine.measuring.machine import Ceilings

_PERCENTILES = (20, 50, 80)


def limits_of(probes: Sequence[Ceilings], contender: Contender) -> Limits:
    """The best that the machine showed it can read and, in the arithmetic the contender may use, compute."""
    dtype = "float32" if contender.arithmetic == "float32" else "bfloat16"
    limits = Limits.best_of(probes, dtype)
    if contender.arithmetic == "int8":
        limits = Limits(limits.read_bytes_per_s, max(limits.flops_per_s, *(p.int8_ops for p in probes)))
    return limits


def work_of(config: ModelConfig, contender: Contender, point: ComparePoint) -> Work:
    """What one round cannot do without. The guard heads stand for the peers' vocabulary, which is as large."""
    cost = CostModel(config, contender.weight_bytes, contender.kv_bytes)
    positions = [range(point.context_len, point.context_len + point.k)] * point.num_streams
    return cost.of_tokens(positions, num_wanted=None if point.context_len else point.num_streams)


def make_row(
    config: ModelConfig,
    point: ComparePoint,
    engine: Contender,
    peer: Contender,
    turns: Turns,
    probes: Sequence[Ceilings],
    agreement: str | None,
) -> dict[str, Any]:
    """One row of the record. Ratios are of the same round: the machine may be faster in the next."""
    ratios = np.divide(turns.peer_s, turns.engine_s)
    sides = {}
    for side, contender, seconds in (("engine", engine, turns.engine_s), ("peer", peer, turns.peer_s)):
        limits = limits_of(probes, contender)
        floor_s, bound = limits.seconds(work_of(config, contender, point))
        median_s = float(np.median(seconds))
        sides[side] = {
            "name": contender.name,
            "ms": _percentiles(1e3 * np.array(seconds)),
            "rounds_ms": [1e3 * value for value in seconds],
            "tokens_per_s": point.num_streams * point.k / median_s,
            "floor_ms": 1e3 * floor_s,
            "floor_bound": bound,
            "share_of_floor": floor_s / median_s,
            "ceilings": asdict(limits),
        }
    return {
        **point._asdict(),
        **sides,
        "engine_is_faster_by": _percentiles(ratios),
        "idle_cores": turns.idle_cores,
        "next_tokens_as_expected": agreement,
    }


def markdown(record: Mapping[str, Any]) -> str:
    """The record as text: machine, versions, one line a pair, what failed and why."""
    here = record["machine"]
    parts = [
        f"**{record['model']}**, {record['threads']} threads, {record['rounds']} rounds a pair, taking turns\n"
        f"- machine: {here['cpu']}, {here['cores']} cores, {here['memory_bytes'] / 2**30:.0f} GiB\n"
        f"- commit: {record['commit'] or 'unknown'}{' (with changes)' if here.get('is_dirty') else ''}; "
        f"{record['time']}\n- command: `{record['command']}`\n"
        + "\n".join(f"- {name}: {_said(said)}" for name, said in record["contenders"].items())
    ]
    if record["rows"]:
        parts.append(_table(record["rows"]))
        parts.append(
            "ms: median of a round, from the next tokens being there to their results. faster by: the peer's time "
            "over the engine's in the same round, median (p20 to p80). of floor: the least time in which this "
            "machine could have read or computed what the round needs at that weight format, over the median."
        )
    if record["failures"]:
        lines = [
            f"- {failure['contender']}, {failure['point']}: {failure['reason']}"
            for failure in record["failures"]
        ]
        parts.append("Not measured:\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = (
        "streams x context",
        "engine",
        "peer",
        "engine ms",
        "p20 to p80",
        "peer ms",
        "p20 to p80",
        "engine tokens/s",
        "peer tokens/s",
        "faster by",
        "engine of floor",
        "peer of floor",
    )
    lines = []
    for row in rows:
        engine, peer, ratio = row["engine"], row["peer"], row["engine_is_faster_by"]
        point = ComparePoint(row["num_streams"], row["context_len"], row["k"])
        lines.append(
            (
                name_point(point),
                engine["name"].partition(":")[2],
                peer["name"],
                *(text for side in (engine, peer) for text in _times(side["ms"])),
                f"{engine['tokens_per_s']:.1f}",
                f"{peer['tokens_per_s']:.1f}",
                f"{ratio['p50']:.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f})",
                *(f"{side['share_of_floor']:.0%} ({side['floor_bound']})" for side in (engine, peer)),
            )
        )
    return markdown_table(header, lines)


def _times(ms: Mapping[str, float]) -> tuple[str, str]:
    return f"{ms['p50']:.1f}", f"{ms['p20']:.1f} to {ms['p80']:.1f}"


def _percentiles(values: Any) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(values, p)) for p in _PERCENTILES}


def _said(said: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in said.items() if name != "system_info")
