"""The report of `evaluate` as Markdown. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

from guardengine.evaluate.metrics import LATENCY_BINS, MAX_TIMELY
from guardengine.evaluate.summary import Report, Section

_MAX_BAD_ROWS = 20


def markdown(report: Report) -> str:
    """The report as Markdown: what was run, then the tables of each file and target."""
    parts = [_heading(report), *(part for section in report.sections for part in _section(section))]
    if report.bad_rows:
        shown = [f"- {reason}" for reason in report.bad_rows[:_MAX_BAD_ROWS]]
        if (more := len(report.bad_rows) - len(shown)) > 0:
            shown.append(f"- and {more} more")
        parts.append("\n".join((f"Bad rows, left out: {len(report.bad_rows)}", *shown)))
    return "\n\n".join(parts)


def _heading(report: Report) -> str:
    engine = report.engine
    judged = "with" if report.thinking else "without"
    return (
        f"**{report.checkpoint}**, a {report.kind} checkpoint; responses are judged {judged} their reasoning\n"
        f"- engine: {engine['version']}, backend {engine['backend']} ({engine['isa'] or 'torch'}), "
        f"{engine['quantization'] or engine['dtype']} weights, {engine['num_threads']} threads"
    )


def _section(section: Section) -> list[str]:
    lines = [
        f"### {section.file}: {section.target}s",
        "",
        f"{section.num_rows} rows, {section.num_unsafe} of them unsafe"
        + (
            f"; {section.num_unparsable} answers unparsable, counted as unsafe"
            if section.num_unparsable
            else ""
        ),
    ]
    parts = ["\n".join(lines), _rules(section)]
    if any(result.latency for result in section.rules):
        parts += [_latency(section), *_warnings(section)]
    parts.append(_scores(section))
    return parts


def _rules(section: Section) -> str:
    rows = []
    for result in section.rules:
        counts = result.counts
        rows.append(
            (
                result.rule,
                result.mode,
                f"{counts.f1:.4f}",
                f"{counts.precision:.4f}",
                f"{counts.recall:.4f}",
                _rate(counts.false_positive_rate),
                str(counts.tp),
                str(counts.fp),
                str(counts.fn),
                str(counts.tn),
            )
        )
    names = ("rule", "mode", "F1", "precision", "recall", "false positive rate", "TP", "FP", "FN", "TN")
    return _table(names, rows, 2)


def _latency(section: Section) -> str:
    rows = []
    for result in section.rules:
        if (found := result.latency) is None:
            continue
        median = "-" if found.median is None else f"{found.median:+.1f}"
        bins = (str(found.bins[name]) for name in LATENCY_BINS)
        rates = (f"{found.exact_hit_rate:.4f}", f"{found.stop_rate:.4f}")
        rows.append((result.rule, result.mode, *rates, median, *bins))
    names = ("rule", "mode", "exact hit", f"within {MAX_TIMELY}", "median", *LATENCY_BINS)
    return (
        "Tokens from the unsafe sentence to the detection (negative: ahead of it; Safe: never detected):\n\n"
        + _table(names, rows, 2)
    )


def _warnings(section: Section) -> list[str]:
    found = []
    if section.num_without_span:
        found.append(
            f"{section.num_without_span} unsafe rows have no span on record and are not in this table."
        )
    if section.num_other_ids:
        found.append(
            f"{section.num_other_ids} spans were counted on other tokens (input_ids) than were judged, so their "
            "distances may be off."
        )
    return found


def _scores(section: Section) -> str:
    rows = [
        (scores.mode, _rate(scores.area_under_roc), _rate(scores.calibration_error))
        for scores in section.scores
    ]
    return _table(("mode", "area under ROC", "calibration error"), rows, 1)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], num_left: int) -> str:
    """A table whose columns are as wide as their cells. The first `num_left` columns are words, the others numbers."""
    widths = [max(len(name), 3, *(len(row[i]) for row in rows)) for i, name in enumerate(names)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    marks = ["-" * w if i < num_left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join((line(names), f"| {' | '.join(marks)} |", *(line(row) for row in rows)))
