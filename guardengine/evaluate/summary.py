"""Outcomes as numbers: one section for each file and target. No text and no pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from guardengine.evaluate.metrics import (
    CalibrationBin,
    Counts,
    Detection,
    Latency,
    RocPoint,
    area_under,
    calibration,
    calibration_error,
    count,
    latency,
    roc,
)
from guardengine.evaluate.outcomes import MODES, Mode, Outcome, RuleName, Target


@dataclass(frozen=True, slots=True)
class RuleResult:
    """The result of one rule in one mode.

    Attributes:
        rule: The rule.
        mode: "strict" or "loose".
        counts: The confusion matrix.
        latency: How soon unsafe responses were detected; None where no row has a span.
        distances: The distances of those detected, in tokens, in the order of rows.
    """

    rule: RuleName
    mode: Mode
    counts: Counts
    latency: Latency | None
    distances: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """The quality of the scores of one mode, over all thresholds."""

    mode: Mode
    roc: tuple[RocPoint, ...]
    area_under_roc: float | None
    calibration: tuple[CalibrationBin, ...]
    calibration_error: float | None


@dataclass(frozen=True, slots=True)
class Section:
    """The rows of one file whose prompt, or whose response, was judged.

    Attributes:
        file: The file.
        target: "prompt" or "response".
        num_rows: Number of rows.
        num_unsafe: Number of unsafe rows.
        num_without_span: Unsafe rows without a span, where other rows have one.
        num_other_ids: Rows whose input_ids are not the tokens that were judged.
        num_unparsable: Answers of a Gen checkpoint that could not be parsed.
        rules: The results of each rule and mode.
        scores: The results of the scores of each mode.
    """

    file: str
    target: Target
    num_rows: int
    num_unsafe: int
    num_without_span: int
    num_other_ids: int
    num_unparsable: int
    rules: tuple[RuleResult, ...]
    scores: tuple[ScoreResult, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `evaluate`.

    Attributes:
        checkpoint: The path or hub id.
        kind: "Stream" or "Gen".
        thinking: Whether reasoning was judged with its response.
        engine: Version, backend, instruction set, dtype, quantization and threads.
        sections: One for each file and target.
        bad_rows: The reasons why rows were left out, with their places.
    """

    checkpoint: str
    kind: str
    thinking: bool
    engine: dict[str, Any]
    sections: tuple[Section, ...]
    bad_rows: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything, with the rates that follow from counts, ready for json.dump."""
        record = asdict(self)
        for section, plain in zip(self.sections, record["sections"], strict=True):
            for result, each in zip(section.rules, plain["rules"], strict=True):
                counts = result.counts
                each |= {"f1": counts.f1, "precision": counts.precision, "recall": counts.recall}
                each["false_positive_rate"] = counts.false_positive_rate
                if result.latency:
                    each["latency"] |= {
                        "exact_hit_rate": result.latency.exact_hit_rate,
                        "stop_rate": result.latency.stop_rate,
                    }
            for scores, each in zip(section.scores, plain["scores"], strict=True):
                each["roc"] = [
                    {**point._asdict(), "threshold": _finite(point.threshold)} for point in scores.roc
                ]
                each["calibration"] = [found._asdict() for found in scores.calibration]
        return {"schema": 1, **record}


def summarize(outcomes: Iterable[Outcome], rules: Sequence[RuleName]) -> tuple[Section, ...]:
    """Sections, in the order in which files and targets first occur."""
    groups: dict[tuple[str, Target], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((str(outcome.row.file), outcome.target), []).append(outcome)
    return tuple(_section(file, target, found, rules) for (file, target), found in groups.items())


def _section(file: str, target: Target, outcomes: list[Outcome], rules: Sequence[RuleName]) -> Section:
    actual = [outcome.row.is_unsafe for outcome in outcomes]
    # A prompt has one label, so it cannot be detected early or late.
    unsafe = [outcome for outcome in outcomes if outcome.row.is_unsafe and target == "response"]
    located = [outcome for outcome in unsafe if outcome.row.span is not None]
    has_latency = bool(located) and "answer" not in rules
    return Section(
        file=file,
        target=target,
        num_rows=len(outcomes),
        num_unsafe=sum(actual),
        num_without_span=len(unsafe) - len(located) if has_latency else 0,
        num_other_ids=sum(outcome.has_own_ids for outcome in located if has_latency),
        num_unparsable=sum(outcome.is_unparsable for outcome in outcomes),
        rules=tuple(
            _rule_result(rule, mode, outcomes, actual, located if has_latency else [])
            for rule in rules
            for mode in MODES
        ),
        scores=tuple(_score_result(mode, outcomes, actual) for mode in MODES),
    )


def _rule_result(
    rule: RuleName, mode: Mode, outcomes: list[Outcome], actual: list[bool], located: list[Outcome]
) -> RuleResult:
    detections = [
        Detection(outcome.calls[rule, mode].position, *outcome.row.span)
        for outcome in located
        if outcome.row.span is not None
    ]
    return RuleResult(
        rule,
        mode,
        count([outcome.calls[rule, mode].is_unsafe for outcome in outcomes], actual),
        latency(detections) if detections else None,
        tuple(each.distance for each in detections if each.distance is not None),
    )


def _score_result(mode: Mode, outcomes: list[Outcome], actual: list[bool]) -> ScoreResult:
    scores = [outcome.scores[mode] for outcome in outcomes]
    points, bins = roc(scores, actual), calibration(scores, actual)
    return ScoreResult(mode, tuple(points), area_under(points), tuple(bins), calibration_error(bins))


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
