"""The record of a GPU check as JSON and as Markdown. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guardengine.measuring.files import markdown_table, write_json

_TIMED = ("speed", "transformers", "vllm", "sglang")


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write the record. Raises ConfigError when the file cannot be written."""
    write_json(record, path)


def markdown(record: Mapping[str, Any]) -> str:
    """The record as Markdown: what was checked, what differs, and one table of step times."""
    sections = record["sections"]
    device = sections.get("device", {})
    lines = [
        f"**{record['kind']}**: {record['preset']} on {device.get('gpu', 'the CPU')}"
        + (f", driver {device['driver']}" if device.get("driver") else ""),
        "",
    ]
    for name, found in sections.items():
        lines.append(f"- {name}: {_summary(name, found)} ({found['seconds']:g} s)")
    if record["problems"]:
        lines += ["", f"{len(record['problems'])} problem(s):", ""]
        lines += [f"- {problem}" for problem in record["problems"]]
    else:
        lines += ["", "Nothing differs."]
    table = _table(sections)
    return "\n".join([*lines, "", *([table, ""] if table else [])])


def _summary(name: str, found: Mapping[str, Any]) -> str:
    if "error" in found:
        return f"FAILED, {found['error']}"
    if "left_out" in found:
        return f"left out: {found['left_out']}"
    if name == "operators":
        return f"{len(found['cases'])} cases, {found['failed']} of them wrong"
    if name == "engine":
        parts = [
            f"{dtype}: {row['labels']} labels, largest error {row['largest_error']:.1e}"
            for dtype, row in found.items()
            if isinstance(row, Mapping)
        ]
        return "; ".join(parts)
    if name in _TIMED:
        timed = sum("step_ms" in row for row in found["rows"])
        return f"{timed} of {len(found['rows'])} points timed"
    return "done"


def _table(sections: Mapping[str, Any]) -> str:
    points: dict[tuple[int, int], dict[str, Any]] = {}
    for name in _TIMED:
        for row in sections.get(name, {}).get("rows", ()):
            points.setdefault((row["context"], row["streams"]), {})[name] = row
    if not points:
        return ""
    rows: list[Sequence[str]] = []
    for (context, streams), by_name in sorted(points.items()):
        own = by_name.get("speed", {})
        predicted = own.get("predicted_ms")
        rows.append(
            (
                f"{context}",
                f"{streams}",
                _milliseconds(own),
                "" if predicted is None else f"{predicted:.2f}",
                f"{own['tokens_per_s']:.0f}" if "tokens_per_s" in own else "",
                *(_milliseconds(by_name.get(name, {})) for name in _TIMED[1:]),
            )
        )
    header = (
        "context",
        "streams",
        "step ms",
        "predicted ms",
        "tokens/s",
        *(f"{name} ms" for name in _TIMED[1:]),
    )
    return markdown_table(header, rows)


def _milliseconds(row: Mapping[str, Any]) -> str:
    if "step_ms" in row:
        return f"{row['step_ms']['p50']:.2f}"
    return "-" if "left_out" in row else ""
