"""What tokens that nobody judged do to a verdict: Policy.fail, by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardengine import ConfigError, Label, Policy, Verdict
from guardengine.policy import PolicyState

FAILURES = ("error", "timeout", "overload")
RANK = {"allow": 0, "flag": 1, "block": 2}


def label(risk: str = "Safe", role: str = "assistant", position: int = 0) -> Label:
    probs = {name: 0.9 if name == risk else 0.05 for name in ("Safe", "Unsafe", "Controversial")}
    zeros = np.zeros(3, np.float32)
    return Label("s", role, position, 1, risk, "Violent", probs, {"Violent": 1.0}, zeros, zeros)  # type: ignore[arg-type]


def play(policy: Policy, *events: Any) -> PolicyState:
    """Events: a risk (an assistant token's), ("user", risk), or (failure, number of tokens by then)."""
    state = policy.start()
    for event in events:
        if isinstance(event, str):
            state = policy.advance(state, label(event))
        elif event[0] == "user":
            state = policy.advance(state, label(event[1], "user"))
        else:
            state = policy.fail(state, *event)
    return state


def verdict(policy: Policy, *events: Any) -> Verdict:
    return policy.verdict(play(policy, *events))


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("make", [Policy.strict, Policy.loose, lambda: Policy.strict(rule="eval-compat")])
def test_closed_is_the_default_and_blocks(make, failure: str) -> None:
    policy = make()
    assert verdict(policy, "Safe", (failure, 3)) == Verdict("block", "Unknown", None, None, failure, 1)


@pytest.mark.parametrize("failure", FAILURES)
def test_open_clears_and_says_so(failure: str) -> None:
    policy = Policy.strict(**{f"on_{failure}": "open"})
    assert verdict(policy, "Safe", (failure, 3)) == Verdict("allow", "Safe", None, None, f"{failure}-open", 3)
    for other in set(FAILURES) - {failure}:
        assert verdict(policy, (other, 3)).action == "block"


def test_later_labels_are_judged_as_ever() -> None:
    policy = Policy.strict(on_timeout="open")
    after = verdict(policy, "Safe", ("timeout", 3), "Safe", "Unsafe", "Unsafe", "Safe")
    assert (after.action, after.risk, after.rule) == ("block", "Unsafe", "debounce+timeout-open")
    assert after.cleared == 3  # what was shown was shown; nothing more


def test_a_run_of_hits_goes_on_through_a_failure_that_was_let_pass() -> None:
    policy = Policy.strict(on_error="open", debounce=2)
    assert verdict(policy, "Unsafe", ("error", 2), "Unsafe").action == "block"


@pytest.mark.parametrize("events", [["Unsafe", "Unsafe"], [("user", "Unsafe")]])
def test_a_block_stays_what_it_was(events: list[Any]) -> None:
    for policy in (Policy.strict(), Policy.strict(on_error="open")):
        before, after = verdict(policy, *events), verdict(policy, *events, ("error", 9))
        assert after.cleared == before.cleared
        assert (after.action, after.risk, after.position) == (before.action, before.risk, before.position)


def test_a_flag_becomes_a_block_when_failures_are_closed() -> None:
    policy = Policy.strict(action="flag", debounce=1)
    assert verdict(policy, "Unsafe").action == "flag"
    after = verdict(policy, "Unsafe", ("timeout", 1))
    assert (after.action, after.risk, after.rule) == ("block", "Unknown", "timeout")


def test_the_newest_failure_that_was_let_pass_is_named() -> None:
    policy = Policy.strict(on_timeout="open", on_error="open")
    assert verdict(policy, ("timeout", 1), ("error", 2)).rule == "error-open"


def test_closed_after_open_blocks() -> None:
    policy = Policy.strict(on_timeout="open")
    after = verdict(policy, ("timeout", 4), ("overload", 9))
    assert (after.action, after.rule, after.cleared) == ("block", "overload+timeout-open", 4)


def test_a_prompts_label_takes_back_nothing_that_was_cleared() -> None:
    policy = Policy.strict(on_timeout="open")
    assert verdict(policy, ("timeout", 3), ("user", "Safe")).cleared == 3


@pytest.mark.parametrize("option", ["on_error", "on_timeout", "on_overload"])
@pytest.mark.parametrize("value", ["OPEN", "", None, True, False, 0, ["open"]])
def test_bad_options_are_named(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        Policy.strict(**{option: value})


@given(
    events=st.lists(
        st.one_of(
            st.sampled_from(["Safe", "Unsafe", "Controversial"]),
            st.tuples(st.just("user"), st.sampled_from(["Safe", "Unsafe"])),
            st.sampled_from(FAILURES),
        ),
        max_size=20,
    ),
    options=st.fixed_dictionaries(
        {
            "rule": st.sampled_from(["report", "eval-compat"]),
            "action": st.sampled_from(["block", "flag"]),
            "debounce": st.integers(1, 3),
            "hold_back": st.integers(0, 3),
            **{f"on_{failure}": st.sampled_from(["open", "closed"]) for failure in FAILURES},
        }
    ),
    ahead=st.integers(0, 4),
)
def test_verdicts_escalate_and_take_nothing_back(events: list[Any], options: Any, ahead: int) -> None:
    policy = Policy.strict(**options)
    state, num_labels, cleared, rank = policy.start(), 0, 0, 0
    has_failed_closed = False
    for event in events:
        if event in FAILURES:
            state = policy.fail(state, event, num_labels + ahead)
            has_failed_closed |= options[f"on_{event}"] == "closed"
        else:
            role, risk = event if isinstance(event, tuple) else ("assistant", event)
            state = policy.advance(state, label(risk, role))
            num_labels += role == "assistant"
        now = policy.verdict(state)
        assert RANK[now.action] >= rank
        assert cleared <= now.cleared <= num_labels + ahead
        cleared, rank = now.cleared, RANK[now.action]
        if has_failed_closed:
            assert now.action == "block"
