"""Policies on hand-made labels: each rule, what is cleared, and what never happens on any sequence."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardengine.checkpoint.model_config import QUERY_CATEGORIES, RISKS
from guardengine.labels import Label, Verdict
from guardengine.policy import Policy

SEVERITY = {"allow": 0, "flag": 1, "block": 2}
RISK_OF = {"S": "Safe", "U": "Unsafe", "C": "Controversial"}
FLAG_CONTROVERSIAL = {"Controversial": "flag"}


def make_labels(pattern):
    """S, U, C: assistant tokens; s, u, c: user turns. Positions count from 0; categories go by position."""
    return [
        Label(
            stream_id="s",
            role="user" if letter.islower() else "assistant",
            position=position,
            token_id=1,
            risk=RISK_OF[letter.upper()],
            category=QUERY_CATEGORIES[position % 8],
            risk_probs={risk: 0.8 if risk == RISK_OF[letter.upper()] else 0.1 for risk in RISKS},
            category_probs={QUERY_CATEGORIES[position % 8]: 1.0},
            risk_logits=np.zeros(3, np.float32),
            category_logits=np.zeros(8, np.float32),
        )
        for position, letter in enumerate(pattern)
    ]


def verdicts(policy, labels):
    state, seen = policy.start(), [policy.verdict(policy.start())]
    for label in labels:
        state = policy.advance(state, label)
        seen.append(policy.verdict(state))
    return seen


def judge(policy, pattern):
    return policy.judge(make_labels(pattern))


# -- the report's rule ---------------------------------------------------------------------------------------


def test_nothing_decided_is_allow():
    assert judge(Policy.strict(), "") == Verdict("allow", "Safe", None, None, "none", 0)
    assert judge(Policy.strict(), "sSS") == Verdict("allow", "Safe", None, None, "none", 2)


@pytest.mark.parametrize(
    ("pattern", "position", "risk"),
    [
        ("SUU", 2, "Unsafe"),
        ("SUC", 2, "Controversial"),  # mixed hits count; the deciding token's risk is reported
        ("CU", 1, "Unsafe"),
        ("USUSCSUU", 7, "Unsafe"),
        ("SUUUUU", 2, "Unsafe"),  # the first decision stays
    ],
)
def test_report_rule_decides_at_second_consecutive_hit(pattern, position, risk):
    verdict = judge(Policy.strict(), pattern)
    assert (verdict.action, verdict.risk, verdict.position) == ("block", risk, position)
    assert verdict.category == QUERY_CATEGORIES[position]
    assert verdict.rule == "debounce"


@pytest.mark.parametrize("pattern", ["U", "USUSUS", "SCSU", "UsU", "SSSS"])
def test_report_rule_ignores_lone_hits(pattern):
    assert judge(Policy.strict(), pattern).action == "allow"


@pytest.mark.parametrize(("debounce", "position"), [(1, 1), (2, 4), (3, 8), (4, 9), (5, None)])
def test_debounce_is_the_number_of_hits_in_a_row(debounce, position):
    assert judge(Policy.strict(debounce=debounce), "SUSUUSUUUU").position == position


def test_strict_and_loose_differ_in_controversial_only():
    assert judge(Policy.strict(), "SCC").action == "block"
    assert judge(Policy.loose(), "SCC").action == "allow"
    assert judge(Policy.loose(), "SUCU").action == "allow"
    assert judge(Policy.loose(), "SUU").action == judge(Policy.strict(), "SUU").action == "block"
    assert judge(Policy.loose(), "c").action == "allow"
    assert Policy() == Policy.strict()


# -- prompts -------------------------------------------------------------------------------------------------


def test_prompt_decides_at_once():
    assert judge(Policy.strict(debounce=5), "u") == Verdict(
        "block", "Unsafe", QUERY_CATEGORIES[0], 0, "prompt", 0
    )


def test_further_user_turn_is_judged_and_ends_the_run():
    assert judge(Policy.strict(), "sUsU").action == "allow"
    assert judge(Policy.strict(), "sSSUc") == Verdict(
        "block", "Controversial", QUERY_CATEGORIES[4], 4, "prompt", cleared=3
    )
    assert judge(Policy.strict(), "sUUs").rule == "debounce"


# -- actions -------------------------------------------------------------------------------------------------


def test_actions_per_risk_escalate_and_never_back():
    policy = Policy.strict(actions=FLAG_CONTROVERSIAL)
    seen = verdicts(policy, make_labels("sCCSUUSS"))
    assert [v.action for v in seen] == ["allow"] * 3 + ["flag"] * 3 + ["block"] * 3
    assert seen[-1].position == 5
    assert seen[-1].risk == "Unsafe"


def test_block_needs_a_run_of_blocking_hits():
    policy = Policy.strict(actions=FLAG_CONTROVERSIAL)
    assert judge(policy, "UC").action == "flag"
    assert judge(policy, "CU").action == "flag"
    assert judge(policy, "CUU").action == "block"


def test_flagged_prompt_can_still_be_blocked_by_the_response():
    policy = Policy.strict(actions=FLAG_CONTROVERSIAL)
    seen = verdicts(policy, make_labels("cSUU"))
    assert [v.rule for v in seen] == ["none", "prompt", "prompt", "prompt", "debounce"]
    assert judge(policy, "cSCC").rule == "prompt"


# -- what is cleared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pattern", "cleared"),
    [
        ({}, "SSS", [0, 1, 2, 3]),
        ({}, "SUSUU", [0, 1, 1, 3, 3, 3]),  # the lone hit is cleared once the next token is none
        ({}, "SUUSS", [0, 1, 1, 1, 1, 1]),  # a block clears nothing more
        ({"debounce": 3}, "SUUSUUU", [0, 1, 1, 1, 4, 4, 4, 4]),
        ({"hold_back": 2}, "SSSS", [0, 0, 0, 1, 2]),
        ({"hold_back": 2}, "SSSUU", [0, 0, 0, 1, 2, 2]),
        ({"hold_back": 1, "debounce": 3}, "SUU", [0, 0, 1, 1]),
        ({"hold_back": 2}, "SSsSSS", [0, 0, 0, 2, 2, 2, 3]),  # a further user turn clears the response before
        ({"action": "flag"}, "SUUSU", [0, 1, 1, 3, 4, 5]),  # flagged: shown on, nothing can block any more
        ({"action": "flag", "hold_back": 1}, "SUUSU", [0, 0, 1, 2, 3, 4]),
        (
            {"actions": FLAG_CONTROVERSIAL},
            "CCCUU",
            [0, 0, 2, 3, 3, 3],
        ),  # flagged: a run that may block is held
        ({"rule": "eval-compat"}, "SUCUC", [0, 1, 1, 2, 3, 4]),  # another risk starts another run
    ],
)
def test_cleared_by_hand(options, pattern, cleared):
    assert [v.cleared for v in verdicts(Policy.strict(**options), make_labels(pattern))] == cleared


def test_prompt_block_clears_nothing_of_its_response():
    assert [v.cleared for v in verdicts(Policy.strict(hold_back=1), make_labels("sSSuSS"))] == [
        0,
        0,
        0,
        1,
        2,
        2,
        2,
    ]


# -- eval-compat ---------------------------------------------------------------------------------------------


def eval_outcome(risks):
    """(risk, index) by the evaluation script's definition, written down independently: two passes over a list."""
    for wanted in ("Unsafe", "Controversial"):
        for index, pair in enumerate(itertools.pairwise(risks)):
            if pair == (wanted, wanted):
                return wanted, index + 1
    return "Safe", None


@pytest.mark.parametrize(
    ("pattern", "outcome"),
    [
        ("UCUCUC", ("Safe", None)),
        ("CCSS", ("Controversial", 1)),
        ("CCSUU", ("Unsafe", 4)),  # Unsafe takes precedence, although it comes later
        ("UUCC", ("Unsafe", 1)),
        ("CUCC", ("Controversial", 3)),
    ],
)
def test_eval_compat_by_hand(pattern, outcome):
    verdict = judge(Policy.strict(rule="eval-compat"), pattern)
    assert (verdict.risk, verdict.position) == outcome == eval_outcome([RISK_OF[c] for c in pattern])
    assert verdict.rule == ("none" if outcome[0] == "Safe" else "eval-compat")


patterns = st.text("SUC", max_size=24)
turns = st.text("SSUCUCsuc", max_size=24)  # with user turns


@settings(deadline=None, max_examples=300)
@given(patterns)
def test_eval_compat_is_the_scripts_outcome_after_every_token(pattern):
    for policy in (
        Policy.strict(rule="eval-compat"),
        Policy.strict(rule="eval-compat", action="flag"),
        Policy.strict(rule="eval-compat", actions=FLAG_CONTROVERSIAL),
    ):
        for count, verdict in enumerate(verdicts(policy, make_labels(pattern))):
            assert (verdict.risk, verdict.position) == eval_outcome([RISK_OF[c] for c in pattern[:count]])


@settings(deadline=None)
@given(patterns)
def test_eval_compat_loose_looks_for_unsafe_only(pattern):
    verdict = judge(Policy.loose(rule="eval-compat"), pattern)
    risk, position = eval_outcome([RISK_OF[c].replace("Controversial", "Safe") for c in pattern])
    assert (verdict.risk, verdict.position) == (risk, position)


# -- on any sequence -----------------------------------------------------------------------------------------

policies = st.builds(
    lambda base, **options: base(**options),
    st.sampled_from([Policy.strict, Policy.loose]),
    rule=st.sampled_from(["report", "eval-compat"]),
    action=st.sampled_from(["flag", "block"]),
    debounce=st.integers(1, 4),
    hold_back=st.integers(0, 5),
) | st.builds(
    Policy.strict,
    rule=st.sampled_from(["report", "eval-compat"]),
    actions=st.just(FLAG_CONTROVERSIAL),
    debounce=st.integers(1, 4),
    hold_back=st.integers(0, 5),
)


@settings(deadline=None, max_examples=500)
@given(policies, turns)
def test_verdict_never_de_escalates_and_cleared_never_shrinks(policy, pattern):
    seen = verdicts(policy, make_labels(pattern))
    for count, (before, after) in enumerate(itertools.pairwise(seen)):
        assert SEVERITY[before.action] <= SEVERITY[after.action]
        assert before.cleared <= after.cleared <= sum(c.isupper() for c in pattern[: count + 1])
        if before.position != after.position:
            assert after.position == count  # decided by the newest label
        if before.action == "block":
            assert before.cleared == after.cleared


@settings(deadline=None, max_examples=500)
@given(policies, patterns)
def test_report_and_eval_runs_match_a_plain_search(policy, pattern):
    """Who decides first, and what was cleared by then, by looking at whole runs instead of counting."""
    labels = make_labels(pattern)
    hits = [policy.hit(label) for label in labels]
    blocks = [risk is not None and policy.actions.get(risk, policy.action) == "block" for risk in hits]

    def is_run(end, of_blocks):
        window = range(end - policy.debounce + 1, end + 1)
        if window.start < 0 or not all(blocks[i] if of_blocks else hits[i] for i in window):
            return False
        return policy.rule == "report" or len({hits[i] for i in window}) == 1

    blocked = next((i for i in range(len(pattern)) if is_run(i, True)), None)
    flagged = next((i for i in range(len(pattern)) if is_run(i, False)), None)
    verdict = policy.judge(labels)
    assert verdict.action == ("block" if blocked is not None else "flag" if flagged is not None else "allow")
    if blocked is not None:
        assert verdict.cleared <= max(0, blocked + 1 - max(policy.debounce, policy.hold_back))
        if policy.rule == "report":
            assert verdict.position == blocked
    elif flagged is None:  # everything is cleared except the tail that may still matter
        tail = 0
        while tail < len(hits) and hits[-1 - tail] and is_same_run(policy, hits, tail):
            tail += 1
        assert verdict.cleared == max(0, len(hits) - max(tail, policy.hold_back))


def is_same_run(policy, hits, tail):
    return policy.rule == "report" or hits[-1 - tail] == hits[-1]


@settings(deadline=None)
@given(policies, turns, st.integers(0, 24))
def test_states_are_values_so_rollback_and_fork_are_free(policy, pattern, cut):
    labels = make_labels(pattern)
    states = [policy.start()]
    for label in labels:
        states.append(policy.advance(states[-1], label))
    kept = min(cut, len(labels))
    for label in labels[:kept]:  # another branch, advanced meanwhile
        policy.advance(states[kept], label)
    again = states[kept]
    for label in labels[kept:]:
        again = policy.advance(again, label)
    assert again == states[-1]
    assert policy.verdict(again) == policy.judge(labels)
