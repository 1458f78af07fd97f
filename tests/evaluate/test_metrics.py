"""Metrics of `guardengine evaluate`: against cases worked out by hand and against the definitions, spelled out."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from guardengine import GenModeration, Label, Policy, Verdict
from guardengine.evaluate.metrics import (
    LATENCY_BINS,
    Counts,
    Detection,
    RocPoint,
    area_under,
    calibration,
    calibration_error,
    count,
    debounced_score,
    latency,
    roc,
)
from guardengine.evaluate.outcomes import Outcome, gen_outcome, stream_outcome
from guardengine.evaluate.rows import Row
from guardengine.evaluate.summary import Report, summarize

RISKS = ("Safe", "Unsafe", "Controversial")
CATEGORIES = ("Violent", "PII")


def label(position: int, probs: tuple[float, float, float], category: str = "Violent") -> Label:
    return Label(
        stream_id="s",
        role="assistant",
        position=position,
        token_id=1,
        risk=RISKS[int(np.argmax(probs))],
        category=category,
        risk_probs=dict(zip(RISKS, probs, strict=True)),
        category_probs={name: float(name == category) for name in CATEGORIES},
        risk_logits=np.zeros(3, np.float32),
        category_logits=np.zeros(2, np.float32),
    )


def labels_of(letters: str, start: int = 0) -> list[Label]:
    """ "SUC": one label each."""
    probs = {"S": (0.8, 0.1, 0.1), "U": (0.1, 0.8, 0.1), "C": (0.1, 0.2, 0.7)}
    return [label(start + i, probs[letter]) for i, letter in enumerate(letters)]


def row(*, is_unsafe: bool = True, span: tuple[int, int] | None = None, file: str = "a.jsonl") -> Row:
    return Row(Path(file), f"{file}, line 1", [], is_unsafe, span, None)


def outcome(letters: str, *, num_reply: int | None = None, start: int = 0, **fields) -> Outcome:
    labels = labels_of(letters, start)
    return stream_outcome(row(**fields), "response", labels, len(labels) if num_reply is None else num_reply)


# -- counts ------------------------------------------------------------------------------------------------


def test_counts_by_hand() -> None:
    found = count(
        [True, True, True, False, False, False, False], [True, True, False, True, False, False, False]
    )
    assert found == Counts(tp=2, fp=1, fn=1, tn=3)
    assert (found.precision, found.recall, found.f1) == (2 / 3, 2 / 3, 2 / 3)
    assert found.false_positive_rate == 1 / 4


@pytest.mark.parametrize(
    ("predicted", "actual"),
    [([], []), ([False], [True]), ([True], [False]), ([False], [False])],
)
def test_a_share_of_nothing_is_zero(predicted: list[bool], actual: list[bool]) -> None:
    found = count(predicted, actual)
    assert (found.precision, found.recall, found.f1) == (0, 0, 0)


def test_without_safe_rows_there_is_no_false_positive_rate() -> None:
    assert count([True, False], [True, True]).false_positive_rate is None


def test_rows_are_not_dropped_silently() -> None:
    with pytest.raises(ValueError):
        count([True], [True, False])


@given(st.lists(st.tuples(st.booleans(), st.booleans())))
def test_f1_is_the_share_of_hits_among_all_that_is_or_was_called_unsafe(pairs) -> None:
    found = count([p for p, _ in pairs], [a for _, a in pairs])
    hits = sum(p and a for p, a in pairs)
    either = sum(p for p, _ in pairs) + sum(a for _, a in pairs)
    assert math.isclose(found.f1, Fraction(2 * hits, either) if hits else 0, abs_tol=1e-12)
    assert found.tp + found.fp + found.fn + found.tn == len(pairs)


# -- calls: which token decides ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("letters", "report_strict", "report_loose", "script_strict", "script_loose"),
    [
        ("SSUUS", 3, 3, 3, 3),
        ("UUSSS", 1, 1, 1, 1),  # at the earliest token that can decide
        ("CCUUS", 1, 3, 3, 3),  # the script looks for Unsafe first, wherever it is
        ("SCCSS", 2, None, 2, None),
        ("CCCCC", 1, None, 1, None),  # all Controversial
        ("UCUCU", 1, None, None, None),  # alternating: nothing for the script
        ("USUSU", None, None, None, None),
        ("U", None, None, None, None),
        ("", None, None, None, None),
        ("SSSSS", None, None, None, None),
    ],
)
def test_calls_by_hand(letters, report_strict, report_loose, script_strict, script_loose) -> None:
    calls = outcome(letters, start=100).calls
    expected = {
        ("report", "strict"): report_strict,
        ("report", "loose"): report_loose,
        ("eval-compat", "strict"): script_strict,
        ("eval-compat", "loose"): script_loose,
    }
    for key, position in expected.items():
        assert calls[key].is_unsafe == (position is not None), key
        assert calls[key].position == (None if position is None else 100 + position), key


def test_the_newline_behind_the_reply_is_the_scripts_alone() -> None:
    calls = outcome("SSUU", num_reply=3).calls
    assert not calls["report", "strict"].is_unsafe
    assert calls["eval-compat", "strict"].position == 3


def first_pair(letters: str, *kinds: str) -> int | None:
    """Where the second of two neighbours is, both of which are of these kinds."""
    pairs = [i for i in range(1, len(letters)) if letters[i] in kinds and letters[i - 1] in kinds]
    return pairs[0] if pairs else None


@given(st.text("SUC", max_size=12))
def test_calls_are_those_of_the_definitions(letters: str) -> None:
    found = outcome(letters).calls
    unsafe, controversial = first_pair(letters, "U"), first_pair(letters, "C")
    assert found["report", "strict"].position == first_pair(letters, "U", "C")
    assert found["report", "loose"].position == unsafe
    assert found["eval-compat", "strict"].position == (controversial if unsafe is None else unsafe)
    assert found["eval-compat", "loose"].position == unsafe


PROBS = st.tuples(*[st.integers(1, 20)] * 3).map(lambda n: tuple(x / sum(n) for x in n))


@given(st.lists(PROBS, max_size=6), st.integers(1, 100))
@example([(0.2, 0.4, 0.4)] * 2, 80)
def test_scores_are_the_thresholds_at_which_a_policy_turns(probs, percent: int) -> None:
    labels = [label(i, each) for i, each in enumerate(probs)]
    scores = stream_outcome(row(), "response", labels, len(labels)).scores
    threshold = percent / 100
    strict = Policy.strict(category_thresholds=dict.fromkeys(CATEGORIES, threshold))
    loose = Policy.loose(risk_thresholds={"Unsafe": threshold})
    assert (strict.judge(labels).action != "allow") == (scores["strict"] >= threshold)
    assert (loose.judge(labels).action != "allow") == (scores["loose"] >= threshold)


def test_numbers_that_are_none_are_hits_and_score_one() -> None:
    broken = [label(i, (math.nan, 0.5, 0.5)) for i in range(2)]
    found = stream_outcome(row(), "response", broken, 2)
    assert found.scores == {"strict": 1.0, "loose": 1.0}
    assert all(call.is_unsafe for call in found.calls.values())
    assert debounced_score([math.nan, 0.25]) == 0.25


@given(st.lists(st.floats(0, 1)), st.integers(1, 4), st.floats(0.001, 1))
def test_a_debounced_score_is_where_runs_end(scores: list[float], debounce: int, threshold: float) -> None:
    longest = run = 0
    for score in scores:
        run = run + 1 if score >= threshold else 0
        longest = max(longest, run)
    assert (debounced_score(scores, debounce) >= threshold) == (longest >= debounce)


# -- latency -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "distance", "name"),
    [
        (None, None, "Safe"),
        (0, -10, "Ahead"),
        (9, -1, "Ahead"),
        (10, 0, "Hit"),
        (20, 0, "Hit"),
        (21, 1, "1-32"),
        (52, 32, "1-32"),
        (53, 33, "33-64"),
        (84, 64, "33-64"),
        (85, 65, "65-128"),
        (148, 128, "65-128"),
        (149, 129, "129-256"),
        (276, 256, "129-256"),
        (277, 257, ">256"),
    ],
)
def test_distances_and_bins_by_hand(position: int | None, distance: int | None, name: str) -> None:
    found = Detection(position, 10, 20)
    assert (found.distance, found.bin) == (distance, name)


def test_latency_by_hand() -> None:
    positions = (None, 4, 15, 20, 30, 148, 149, 500)
    found = latency([Detection(position, 10, 20) for position in positions])
    assert found.bins == {
        "Ahead": 1, "Hit": 2, "1-32": 1, "33-64": 0, "65-128": 1, "129-256": 1, ">256": 1, "Safe": 1
    }  # fmt: skip
    assert found.exact_hit_rate == 2 / 8
    assert found.stop_rate == 5 / 8  # what is ahead counts as stopped in time
    assert found.median == 10


def test_latency_of_nothing() -> None:
    nothing, never = latency([]), latency([Detection(None, 0, 0)])
    assert (nothing.exact_hit_rate, nothing.stop_rate, nothing.median) == (0, 0, None)
    assert (never.exact_hit_rate, never.stop_rate, never.median) == (0, 0, None)
    assert never.bins["Safe"] == 1


@given(st.lists(st.tuples(st.none() | st.integers(0, 600), st.integers(0, 300), st.integers(0, 30))))
def test_latency_adds_up(cases) -> None:
    detections = [Detection(position, start, start + length) for position, start, length in cases]
    found = latency(detections)
    inside = sum(p is not None and s <= p <= s + n for p, s, n in cases)
    assert list(found.bins) == list(LATENCY_BINS)
    assert sum(found.bins.values()) == found.num_responses == len(cases)
    assert found.num_exact == found.bins["Hit"] == inside
    assert found.num_stopped == sum(p is not None and p - (s + n) <= 128 for p, s, n in cases)
    assert found.bins["Ahead"] == sum(p is not None and p < s for p, s, n in cases)


# -- curves ------------------------------------------------------------------------------------------------


def test_roc_by_hand() -> None:
    points = roc([0.9, 0.8, 0.8, 0.1], [True, False, True, False])
    assert points == [
        RocPoint(math.inf, 0, 0),
        RocPoint(0.9, 0, 0.5),
        RocPoint(0.8, 0.5, 1),
        RocPoint(0.1, 1, 1),
    ]
    assert area_under(points) == 0.875


@pytest.mark.parametrize("actual", [[True, True], [False, False]])
def test_no_curve_without_both_kinds(actual: list[bool]) -> None:
    assert roc([0.1, 0.2], actual) == []
    assert area_under([]) is None


SCORED = st.lists(st.tuples(st.integers(0, 8).map(lambda n: n / 8), st.booleans()), max_size=25)


@given(SCORED)
def test_roc_is_that_of_all_thresholds_and_its_area_that_of_all_pairs(pairs) -> None:
    scores, actual = [s for s, _ in pairs], [a for _, a in pairs]
    points = roc(scores, actual)
    for point in points:
        found = count([score >= point.threshold for score in scores], actual)
        assert (point.false_positive_rate, point.true_positive_rate) == (
            found.false_positive_rate,
            found.recall,
        )
    unsafe = [s for s, a in pairs if a]
    safe = [s for s, a in pairs if not a]
    if unsafe and safe:
        wins = sum((u > s) + (u == s) / 2 for u in unsafe for s in safe)
        area = area_under(points)
        assert area is not None
        assert math.isclose(area, wins / (len(unsafe) * len(safe)))


def test_calibration_by_hand() -> None:
    bins = calibration([0.0, 0.1, 0.5, 0.75, 1.0], [False, True, True, True, False], num_bins=2)
    assert [(each.low, each.high, each.num_rows) for each in bins] == [(0, 0.5, 2), (0.5, 1, 3)]
    assert [each.share_unsafe for each in bins] == [1 / 2, 2 / 3]
    assert [each.mean_score for each in bins] == pytest.approx([0.05, 0.75])
    assert calibration_error(bins) == pytest.approx((2 * 0.45 + 3 * (0.75 - 2 / 3)) / 5)
    assert calibration_error(calibration([], [])) is None


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=25), st.integers(1, 12))
def test_every_row_is_in_the_bin_that_its_score_names(pairs, num_bins: int) -> None:
    bins = calibration([s for s, _ in pairs], [a for _, a in pairs], num_bins)
    for each in bins:
        inside = [s for s, _ in pairs if each.low <= s < each.high or s == each.high == 1]
        assert each.num_rows == len(inside)
    assert sum(each.num_rows for each in bins) == len(pairs)


# -- Gen ---------------------------------------------------------------------------------------------------


def answer(safety: str, probs: dict[str, float] | None = None) -> GenModeration:
    verdict = Verdict("allow", "Safe", None, None, "none", 0)
    return GenModeration("assistant", safety, (), "No", probs or {}, {}, {}, "", verdict, 1, 1)


@pytest.mark.parametrize(
    ("safety", "strict", "loose"),
    [
        ("Safe", False, False),
        ("Controversial", True, False),
        ("Unsafe", True, True),
        ("Unparsable", True, True),
    ],
)
def test_gen_answers(safety: str, strict: bool, loose: bool) -> None:
    found = gen_outcome(row(), "response", answer(safety))
    assert found.calls["answer", "strict"] == (strict, None)
    assert found.calls["answer", "loose"] == (loose, None)
    assert found.scores == {"strict": float(strict), "loose": float(loose)}
    assert found.is_unparsable == (safety == "Unparsable")


def test_gen_scores_are_probabilities() -> None:
    found = gen_outcome(
        row(), "prompt", answer("Safe", {"Safe": 0.5, "Unsafe": 0.125, "Controversial": 0.375})
    )
    assert found.scores == {"strict": 0.5, "loose": 0.125}


# -- sections ----------------------------------------------------------------------------------------------


def test_sections_by_hand() -> None:
    outcomes = [
        outcome("SSUU", is_unsafe=True, span=(2, 3)),
        outcome("CCSS", is_unsafe=True, span=(3, 3)),
        outcome("SSSS", is_unsafe=True),
        outcome("SSCC", is_unsafe=False),
        outcome("SSSS", is_unsafe=False),
        outcome("UUUU", is_unsafe=True, file="b.jsonl"),
    ]
    first, second = summarize(outcomes, ("eval-compat",))
    assert (first.num_rows, first.num_unsafe, first.num_without_span) == (5, 3, 1)
    strict, loose = first.rules
    assert strict.counts == Counts(tp=2, fp=1, fn=1, tn=1)
    assert loose.counts == Counts(tp=1, fp=0, fn=2, tn=2)
    assert strict.latency is not None
    assert strict.latency.bins["Hit"] == strict.latency.bins["Ahead"] == 1
    assert strict.distances == (0, -2)
    assert loose.latency is not None
    assert loose.latency.bins["Safe"] == 1
    assert second.file == "b.jsonl"
    assert second.rules[0].latency is None  # no spans
    record = Report("c", "Stream", True, {}, (first, second), ()).as_json()
    assert record["sections"][0]["rules"][0]["f1"] == strict.counts.f1 == 2 / 3
    assert record["sections"][0]["rules"][0]["latency"]["stop_rate"] == 1
    assert record["sections"][0]["scores"][0]["roc"][0]["threshold"] is None
