"""Random policies and labels of conversations as the page gets them, with what the policies make of them."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np

from guardengine import Label, Policy
from guardengine.server.json_values import label_json, verdict_json

RISKS, CATEGORIES = ("Safe", "Unsafe", "Controversial"), ("Violent", "PII", "Unethical")


def random_case(rng: random.Random) -> tuple[Policy, dict[str, Any], list[Label]]:
    """A policy, the same for the page, and the labels of a conversation."""
    options: dict[str, Any] = {
        "debounce": rng.choice((1, 1, 2, 2, 3, 5)),
        "hold_back": rng.choice((0, 0, 1, 4)),
    }
    is_strict = rng.random() < 0.7
    acted_on = ["Unsafe", "Controversial"][: 2 if is_strict else 1]
    options["risk_thresholds"] = {risk: round(rng.random(), 1) for risk in acted_on if rng.random() < 0.4}
    options["actions"] = {risk: rng.choice(("flag", "block")) for risk in acted_on if rng.random() < 0.4}
    options["action"] = rng.choice(("block", "block", "flag"))
    policy = (Policy.strict if is_strict else Policy.loose)(**options)
    sent = {**options, "safe_risks": ["Safe"] if is_strict else ["Safe", "Controversial"]}
    bias = rng.choice((0.2, 0.5, 0.9))
    labels = []
    for position in range(rng.randint(1, 30)):
        is_turn = position == 0 or rng.random() < 0.05
        unsafe = 0.0 if rng.random() < bias else round(rng.random(), 1)
        split = round(unsafe * rng.random(), 1)
        risk_probs = dict(zip(RISKS, (1 - unsafe, split, unsafe - split), strict=True))
        category_probs = {name: rng.random() for name in CATEGORIES}
        if rng.random() < 0.01:
            rng.choice((risk_probs, category_probs)).update({rng.choice(("Safe", "Unsafe")): math.nan})
        labels.append(
            Label(
                stream_id="s",
                role="user" if is_turn else "assistant",
                position=position + 7,
                token_id=position,
                risk=max(risk_probs, key=risk_probs.__getitem__),
                category=max(category_probs, key=category_probs.__getitem__),
                risk_probs=risk_probs,
                category_probs=category_probs,
                risk_logits=np.zeros(3, np.float32),
                category_logits=np.zeros(3, np.float32),
            )
        )
    return policy, sent, labels


def cases_and_verdicts(num: int, seed: int) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Cases as the page gets them, and the policies' verdicts after each label."""
    rng, cases, verdicts = random.Random(seed), [], []
    for _ in range(num):
        policy, sent, labels = random_case(rng)
        state, so_far = policy.start(), []
        for label in labels:
            state = policy.advance(state, label)
            so_far.append(verdict_json(policy.verdict(state)))
        cases.append(
            {"policy": sent, "labels": [{"role": label.role, **label_json(label)} for label in labels]}
        )
        verdicts.append(so_far)
    return cases, verdicts
