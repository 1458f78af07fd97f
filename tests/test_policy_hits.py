"""Which labels are hits: thresholds, categories, broken probabilities; and which options are refused."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest

from guardengine.checkpoint.model_config import QUERY_CATEGORIES, RISKS
from guardengine.errors import ConfigError
from guardengine.labels import LONG_CATEGORY_NAMES, Label
from guardengine.policy import Policy

FLAG_CONTROVERSIAL = {"Controversial": "flag"}


def make_label(risk, role="assistant", category="PII", probs=None, category_probs=None):
    """A label whose likeliest risk is `risk`; probs are those of Safe, Unsafe and Controversial."""
    if probs is None:
        probs = [0.8 if name == risk else 0.1 for name in RISKS]
    return Label(
        stream_id="s",
        role=role,
        position=0,
        token_id=1,
        risk=risk,
        category=category,
        risk_probs=dict(zip(RISKS, probs, strict=True)),
        category_probs=category_probs or {category: 1.0},
        risk_logits=np.zeros(3, np.float32),
        category_logits=np.zeros(8, np.float32),
    )


def with_probs(*probs, **more):
    return make_label(RISKS[int(np.argmax(probs))], probs=probs, **more)


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
    policy = Policy.strict(risk_thresholds=thresholds, actions=inverted)
    assert policy.hit(both) == policy.hit(make_label("Safe", probs=[math.nan] * 3)) == "Controversial"


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
        {"risk_thresholds": {"Unsafe": 1.0}},
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
    short, long = (
        dict.fromkeys(names, 0.25) for names in (LONG_CATEGORY_NAMES, LONG_CATEGORY_NAMES.values())
    )
    assert Policy.strict(category_thresholds=long) == Policy.strict(category_thresholds=short)
    ignoring = Policy.strict(ignored_categories=["Suicide & Self-Harm", '"Violent"'])
    for name in ("Self-Harm", "Suicide & Self-Harm", "Violent", '"Violent"'):
        assert ignoring.hit(make_label("Unsafe", category=name)) is None


def test_check_names_accepts_the_models_names_short_or_long():
    policy = Policy.loose(
        risk_thresholds={"Unsafe": 0.5},
        category_thresholds={"Jailbreak": 0.9},
        ignored_categories=["Political"],
    )
    policy.check_names(RISKS, QUERY_CATEGORIES)
    policy.check_names(RISKS, LONG_CATEGORY_NAMES.values())


@pytest.mark.parametrize(
    ("policy", "risks", "message"),
    [
        (
            Policy.strict(risk_thresholds={"Unsave": 0.5}),
            RISKS,
            "'Unsave'; the model's risks are Safe, Unsafe",
        ),
        (Policy.strict(actions={"unsafe": "flag"}), RISKS, "'unsafe'"),
        (
            Policy.strict(category_thresholds={"Weapons": 0.5}),
            RISKS,
            "'Weapons'; the model's categories are Violent",
        ),
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
        ({"debounce": 0}, "debounce=0: pass a whole number from 1"),
        ({"debounce": True}, "debounce=True"),
        ({"debounce": 2.0}, "debounce=2.0"),
        ({"hold_back": -1}, "hold_back=-1: pass a whole number from 0"),
        ({"hold_back": None}, "hold_back=None"),
        ({"action": "stop"}, "action='stop': choose 'flag' or 'block'"),
        ({"action": "allow"}, "safe_risks"),
        ({"actions": {"Unsafe": "allow"}}, r"actions\['Unsafe'\]='allow'"),
        ({"actions": ["Unsafe"]}, "pass a dict"),
        ({"rule": "majority"}, "rule='majority': choose 'report' or 'eval-compat'"),
        ({"risk_thresholds": {"Unsafe": 1.1}}, "pass a probability from 0 to 1"),
        ({"risk_thresholds": {"Unsafe": math.nan}}, "pass a probability from 0 to 1"),
        ({"risk_thresholds": {"Unsafe": "0.5"}}, "pass a probability from 0 to 1"),
        ({"risk_thresholds": {"Safe": 0.5}}, "counts as safe"),
        ({"risk_thresholds": {1: 0.5}}, "non-empty strings"),
        ({"category_thresholds": {"PII": -0.1}}, "pass a probability from 0 to 1"),
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
