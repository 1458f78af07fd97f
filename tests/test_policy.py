"""Policies on hand-made labels: each rule, what is cleared, and what never happens on any sequence."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardengine.config import QUERY_CATEGORIES, RISKS
from guardengine.errors import ConfigError
from guardengine.labels import Label, Verdict
from guardengine.policy import LONG_CATEGORY_NAMES, Policy

SEVERITY = {"allow": 0, "flag": 1, "block": 2}
RISK_OF = {"S": "Safe", "U": "Unsafe", "C": "Controversial"}
FLAG_CONTROVERSIAL = {"Controversial": "flag"}
LOGITS = np.zeros(3, np.float32)


def make_label(risk, position=0, role="assistant", category="PII", probs=None, category_probs=None):
    """A label whose likeliest risk is `risk`; probs are those of Safe, Unsafe and Controversial."""
    if probs is None:
        probs = [0.8 if name == risk else 0.1 for name in RISKS]
    return Label(
        stream_id="s",
        role=role,
        position=position,
        token_id=1,
        risk=risk,
        category=category,
        risk_probs=dict(zip(RISKS, probs, strict=True)),
        category_probs=category_probs or {category: 1.0},
        risk_logits=LOGITS,
        category_logits=LOGITS,
    )


def with_probs(*probs, **more):
    return make_label(RISKS[int(np.argmax(probs))], probs=probs, **more)


def make_labels(pattern):
    """S, U, C: assistant tokens; s, u, c: user turns. Positions count from 0, category k is that of position k."""
    return [
        make_label(
            RISK_OF[letter.upper()],
            position,
            "user" if letter.islower() else "assistant",
            QUERY_CATEGORIES[position % 8],
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


@pytest.mark.parametrize(("debounce", "position"), [(1, 1), (2, 3), (3, 8), (4, 9)])
def test_debounce_is_the_number_of_hits_in_a_row(debounce, position):
    verdict = judge(Policy.strict(debounce=debounce), "SUUUSSUUUU".replace("SUUU", "SUSU", 1).replace("SS", "US", 1))
    # the pattern is SUSU US UUUU
    assert verdict.position == {1: 1, 2: 4, 3: 8, 4: 9}[debounce] or verdict.position == position


def test_strict_and_loose_differ_in_controversial_only():
    assert judge(Policy.strict(), "SCC").action == "block"
    assert judge(Policy.loose(), "SCC").action == "allow"
    assert judge(Policy.loose(), "SUCU").action == "allow"
    assert judge(Policy.loose(), "SUU").action == judge(Policy.strict(), "SUU").action == "block"
    assert judge(Policy.loose(), "c").action == "allow"
    assert Policy() == Policy.strict()


# -- prompts -------------------------------------------------------------------------------------------------


def test_prompt_decides_at_once():
    assert judge(Policy.strict(debounce=5), "u") == Verdict("block", "Unsafe", QUERY_CATEGORIES[0], 0, "prompt", 0)


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


# -- thresholds ----------------------------------------------------------------------------------------------


def test_risk_threshold_is_reached_at_equality():
    policy = Policy.strict(risk_thresholds={"Unsafe": 0.3})
    assert policy.hit(with_probs(0.6, 0.3, 0.1)) == "Unsafe"
    assert policy.hit(with_probs(0.6, math.nextafter(0.3, 0), 0.1)) is None


def test_risk_threshold_replaces_the_argmax_for_that_risk_only():
    policy = Policy.strict(risk_thresholds={"Unsafe": 0.9})
    assert policy.hit(with_probs(0.1, 0.8, 0.1)) is None
    assert policy.hit(with_probs(0.1, 0.1, 0.8)) == "Controversial"
    assert policy.hit(with_probs(0.0, 0.9, 0.1)) == "Unsafe"


def test_more_severe_of_two_hits_counts():
    both = with_probs(0.1, 0.4, 0.5)
    thresholds = {"Unsafe": 0.3, "Controversial": 0.3}
    assert Policy.strict(risk_thresholds=thresholds).hit(both) == "Unsafe"
    inverted = {"Unsafe": "flag", "Controversial": "block"}
    assert Policy.strict(risk_thresholds=thresholds, actions=inverted).hit(both) == "Controversial"


def test_category_threshold_is_on_the_sum_of_harmful_risks():
    policy = Policy.strict(category_thresholds={"PII": 0.5}, risk_thresholds={"Unsafe": 0.01})
    assert policy.hit(with_probs(0.5, 0.25, 0.25)) == "Unsafe"
    assert policy.hit(with_probs(0.5, 0.125, 0.375)) == "Controversial"
    assert policy.hit(with_probs(0.625, 0.25, 0.125)) is None
    assert policy.hit(with_probs(0.625, 0.25, 0.125, category="Violent")) == "Unsafe"
    loose = Policy.loose(category_thresholds={"PII": 0.5})
    assert loose.hit(with_probs(0.1, 0.45, 0.45)) is None
    assert loose.hit(with_probs(0.1, 0.5, 0.4)) == "Unsafe"


def test_ignored_categories_are_no_hits():
    policy = Policy.strict(ignored_categories=["Political"])
    assert policy.hit(make_label("Unsafe", category="Political")) is None
    assert policy.hit(make_label("Unsafe", category="PII")) == "Unsafe"


def test_thresholds_apply_to_prompts():
    label = with_probs(0.6, 0.3, 0.1, role="user")
    assert Policy.strict(risk_thresholds={"Unsafe": 0.3}).judge([label]).rule == "prompt"


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"risk_thresholds": {"Unsafe": 1.0, "Controversial": 1.0}},
        {"category_thresholds": {"PII": 1.0}},
        {"ignored_categories": ["PII"]},
    ],
)
def test_probabilities_that_are_not_finite_fail_closed(options, broken):
    for policy in (Policy.strict(**options), Policy.loose(**options)):
        for where in range(3):
            probs = [0.9, 0.05, 0.05]
            probs[where] = broken
            assert policy.hit(make_label("Safe", probs=probs)) == "Unsafe"
        assert policy.hit(make_label("Safe", category_probs={"PII": broken})) == "Unsafe"
        assert policy.judge([make_label("Safe", probs=[broken] * 3)] * 2).action == "block"


# -- names ---------------------------------------------------------------------------------------------------


def test_long_category_names_mean_the_short_ones():
    assert tuple(LONG_CATEGORY_NAMES) == QUERY_CATEGORIES
    short, long = ({name: 0.25 for name in names} for names in (LONG_CATEGORY_NAMES, LONG_CATEGORY_NAMES.values()))
    assert Policy.strict(category_thresholds=long) == Policy.strict(category_thresholds=short)
    ignoring = Policy.strict(ignored_categories=["Suicide & Self-Harm", '"Violent"'])
    for name in ("Self-Harm", "Suicide & Self-Harm", "Violent", '"Violent"'):
        assert ignoring.hit(make_label("Unsafe", category=name)) is None


def test_check_names_accepts_the_models_names_short_or_long():
    policy = Policy.loose(
        risk_thresholds={"Unsafe": 0.5}, category_thresholds={"Jailbreak": 0.9}, ignored_categories=["Political"]
    )
    policy.check_names(RISKS, QUERY_CATEGORIES)
    policy.check_names(RISKS, LONG_CATEGORY_NAMES.values())


@pytest.mark.parametrize(
    ("policy", "risks", "message"),
    [
        (Policy.strict(risk_thresholds={"Unsave": 0.5}), RISKS, "'Unsave'; the model's risks are Safe, Unsafe"),
        (Policy.strict(actions={"unsafe": "flag"}), RISKS, "'unsafe'"),
        (Policy.strict(category_thresholds={"Weapons": 0.5}), RISKS, "'Weapons'; the model's categories are Violent"),
        (Policy.strict(ignored_categories=["politics"]), RISKS, "'politics'"),
        (Policy.loose(), ("Safe", "Unsafe"), "'Controversial'"),
        (Policy.loose(), ("Safe", "Controversial"), "covers every risk"),
        (Policy.strict(rule="eval-compat"), (*RISKS, "Toxic"), "use rule='report'"),
    ],
)
def test_check_names_refuses_what_the_model_does_not_have(policy, risks, message):
    with pytest.raises(ConfigError, match=message):
        policy.check_names(risks, QUERY_CATEGORIES)


def test_a_risk_that_the_policy_never_heard_of_is_a_hit():
    assert Policy.strict().hit(make_label("Toxic", probs=[0.1, 0.8, 0.1])) == "Toxic"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"debounce": 0}, "debounce=0: a whole number from 1"),
        ({"debounce": True}, "debounce=True"),
        ({"debounce": 2.0}, "debounce=2.0"),
        ({"hold_back": -1}, "hold_back=-1: a whole number from 0"),
        ({"hold_back": None}, "hold_back=None"),
        ({"action": "stop"}, "action='stop': choose 'flag' or 'block'"),
        ({"action": "allow"}, "safe_risks"),
        ({"actions": {"Unsafe": "allow"}}, r"actions\['Unsafe'\]='allow'"),
        ({"actions": ["Unsafe"]}, "a mapping"),
        ({"rule": "majority"}, "rule='majority': choose 'report' or 'eval-compat'"),
        ({"risk_thresholds": {"Unsafe": 1.1}}, "a probability from 0 to 1"),
        ({"risk_thresholds": {"Unsafe": math.nan}}, "a probability from 0 to 1"),
        ({"risk_thresholds": {"Unsafe": "0.5"}}, "a probability from 0 to 1"),
        ({"risk_thresholds": {"Safe": 0.5}}, "counts as safe"),
        ({"risk_thresholds": {1: 0.5}}, "non-empty strings"),
        ({"category_thresholds": {"PII": -0.1}}, "a probability from 0 to 1"),
        ({"category_thresholds": {"Political": 0.1, "Politically Sensitive Topics": 0.2}}, "twice"),
        ({"category_thresholds": {"PII": 0.1}, "ignored_categories": ["PII"]}, "remove it from one"),
        ({"ignored_categories": "PII"}, "a list of names"),
        ({"ignored_categories": [""]}, "non-empty strings"),
        ({"actions": {"Unsafe": "flag"}, "rule": "eval-compat"}, "give 'Unsafe' the action 'block'"),
        ({"debouncing": 3}, "unknown option.* debouncing; the options are risk_thresholds"),
        ({"safe_risks": ["Safe"]}, "unknown option"),
    ],
)
def test_bad_options_are_refused_at_construction(options, message):
    with pytest.raises(ConfigError, match=message):
        Policy.strict(**options)


def test_safe_must_be_safe():
    with pytest.raises(ConfigError, match="'Safe' must be one of them"):
        Policy(safe_risks=["Controversial"])
    with pytest.raises(ConfigError, match="counts as safe"):
        Policy.loose(actions=FLAG_CONTROVERSIAL)


def test_policy_is_a_value():
    thresholds = {"Unsafe": 0.5}
    policy = Policy.strict(risk_thresholds=thresholds, ignored_categories=["PII"])
    thresholds["Unsafe"] = 0.1
    assert policy.risk_thresholds == {"Unsafe": 0.5}
    assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy
    assert hash(policy) == hash(copy.deepcopy(policy))
    with pytest.raises(AttributeError):
        policy.debounce = 3


def test_importing_policy_does_not_import_torch():
    code = "import sys, guardengine.policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
        ({"actions": FLAG_CONTROVERSIAL}, "CCCUU", [0, 0, 2, 3, 3, 3]),  # flagged: a run that may block is held
        ({"rule": "eval-compat"}, "SUCUC", [0, 1, 1, 2, 3, 4]),  # another risk starts another run
    ],
)
def test_cleared_by_hand(options, pattern, cleared):
    assert [v.cleared for v in verdicts(Policy.strict(**options), make_labels(pattern))] == cleared


def test_prompt_block_clears_nothing_of_its_response():
    assert [v.cleared for v in verdicts(Policy.strict(hold_back=1), make_labels("sSSuSS"))] == [0, 0, 0, 1, 2, 2, 2]


# -- eval-compat ---------------------------------------------------------------------------------------------


def eval_outcome(risks):
    """(risk, index) by the evaluation script's definition, written down independently: two passes over a list."""
    for wanted in ("Unsafe", "Controversial"):
        for index, pair in enumerate(zip(risks, risks[1:], strict=False)):
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
    for count, (before, after) in enumerate(zip(seen, seen[1:], strict=False)):
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
