"""Pictures of a report as PNG files: ROC curves, latency, calibration. Draws only what the report has."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guardengine.errors import ConfigError
from guardengine.evaluate.metrics import LATENCY_BINS, RocPoint
from guardengine.evaluate.outcomes import Mode
from guardengine.evaluate.summary import Report, RuleResult, Section
from guardengine.measuring.plots import import_pyplot

_COLORS: dict[Mode, str] = {"strict": "#1b6ca8", "loose": "#d9822b"}
_MARKERS = {"report": "o", "eval-compat": "s", "answer": "o"}
_HATCHES = {"report": "", "eval-compat": "//", "answer": ""}
_NAMED_THRESHOLDS = (0.9, 0.7, 0.5, 0.3, 0.1)

Draw = Callable[[Any, Section], None]


def save_plots(report: Report, folder: Path) -> list[Path]:
    """Write the pictures of every section.

    There is no ROC curve where all rows are safe or all are unsafe, and no latency where no row has a span.

    Args:
        report: The report.
        folder: The folder for the files; it is made if needed.

    Returns:
        The files, named after their sections.

    Raises:
        ConfigError: matplotlib is not installed, or a file cannot be written.
    """
    pyplot = import_pyplot()
    written: list[Path] = []
    names = _names(report)
    for section, name in zip(report.sections, names, strict=True):
        pictures: list[tuple[str, Draw]] = [("calibration", _draw_calibration)]
        if any(scores.roc for scores in section.scores):
            pictures.append(("roc", _draw_roc))
        if any(result.latency for result in section.rules):
            pictures.append(("latency", _draw_latency))
        for kind, draw in pictures:
            figure, axes = pyplot.subplots(figsize=(7.5, 5.5), layout="constrained")
            draw(axes, section)
            axes.set_title(
                f"{Path(section.file).name}: {section.target}s, {section.num_rows} rows", fontsize=10
            )
            axes.grid(visible=True, alpha=0.3)
            axes.set_axisbelow(True)
            axes.legend(fontsize=8, loc="best", framealpha=0.7)
            figure.suptitle(Path(report.checkpoint).name, fontsize=11)
            path = folder / f"{name}-{kind}.png"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=150)
            except OSError as error:
                raise ConfigError(f"{path} cannot be written ({error}); give another folder") from error
            finally:
                pyplot.close(figure)
            written.append(path)
    return written


def _names(report: Report) -> list[str]:
    """A name for each section, with a number where files in different folders have the same name."""
    names: list[str] = []
    for section in report.sections:
        stem = re.sub(r"[^\w.-]", "_", Path(section.file).stem)
        name, number = f"{stem}-{section.target}", 1
        while name in names:
            number += 1
            name = f"{stem}-{number}-{section.target}"
        names.append(name)
    return names


def _draw_roc(axes: Any, section: Section) -> None:
    for scores in section.scores:
        color = _COLORS[scores.mode]
        xs = [point.false_positive_rate for point in scores.roc]
        ys = [point.true_positive_rate for point in scores.roc]
        area = f"{scores.area_under_roc:.3f}" if scores.area_under_roc is not None else "-"
        axes.plot(xs, ys, color=color, lw=1.6, label=f"{scores.mode}, area {area}")
        named: dict[tuple[float, float], list[str]] = {}
        for threshold in _NAMED_THRESHOLDS:
            at = _at(scores.roc, threshold)
            named.setdefault((at.false_positive_rate, at.true_positive_rate), []).append(f"{threshold:g}")
        for where, thresholds in named.items():
            axes.plot(*where, ".", color=color, ms=7)
            axes.annotate(
                ", ".join(thresholds),
                where,
                xytext=(4, -9) if where[0] < 0.9 else (-4, -9),
                textcoords="offset points",
                ha="left" if where[0] < 0.9 else "right",
                fontsize=7,
                color=color,
            )
    for result in section.rules:
        rate = result.counts.false_positive_rate
        if rate is not None:
            axes.plot(
                rate,
                result.counts.recall,
                _MARKERS[result.rule],
                color=_COLORS[result.mode],
                mfc="none",
                ms=9,
                label=f"{result.rule}, {result.mode}: no threshold",
            )
    axes.plot((0, 1), (0, 1), color="#777777", lw=0.8, ls=":")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate (recall); numbers: thresholds")


def _at(points: tuple[RocPoint, ...], threshold: float) -> RocPoint:
    """The point of a threshold: the last point at or above it."""
    return [point for point in points if point.threshold >= threshold][-1]


def _draw_latency(axes: Any, section: Section) -> None:
    results = [result for result in section.rules if result.latency]
    width = 0.8 / len(results)
    for index, result in enumerate(results):
        _draw_bars(axes, result, [x + (index + 0.5) * width - 0.4 for x in range(len(LATENCY_BINS))], width)
    axes.set_xticks(range(len(LATENCY_BINS)), LATENCY_BINS)
    axes.set_xlabel("tokens behind the unsafe sentence; Ahead: before it; Safe: never detected")
    axes.set_ylabel("unsafe responses")


def _draw_bars(axes: Any, result: RuleResult, xs: list[float], width: float) -> None:
    if result.latency is None:
        return
    axes.bar(
        xs,
        [result.latency.bins[name] for name in LATENCY_BINS],
        width,
        color=_COLORS[result.mode],
        hatch=_HATCHES[result.rule],
        edgecolor="white",
        label=f"{result.rule}, {result.mode}: exact {result.latency.exact_hit_rate:.1%}, "
        f"within 128 {result.latency.stop_rate:.1%}",
    )


def _draw_calibration(axes: Any, section: Section) -> None:
    for scores in section.scores:
        found = [each for each in scores.calibration if each.num_rows]
        error = "-" if scores.calibration_error is None else f"{scores.calibration_error:.3f}"
        axes.plot(
            [each.mean_score for each in found],
            [each.share_unsafe for each in found],
            marker="o",
            color=_COLORS[scores.mode],
            label=f"{scores.mode}, calibration error {error}",
        )
        for each in found:
            axes.annotate(
                str(each.num_rows),
                (each.mean_score, each.share_unsafe),
                xytext=(4, 5),
                textcoords="offset points",
                fontsize=7,
                color=_COLORS[scores.mode],
            )
    axes.plot((0, 1), (0, 1), color="#777777", lw=0.8, ls=":", label="calibrated")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    what = "two tokens in a row reach it" if section.target == "response" else "probability"
    axes.set_xlabel(f"score ({what}), mean of each bin")
    axes.set_ylabel("share that is unsafe; numbers: rows")
