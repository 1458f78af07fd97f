"""Labels, verdicts and spans as plain JSON values. Shared by HTTP, WebSocket and the command line; no web framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from guardengine.labels import Label, Verdict
from guardengine.policy import Policy
from guardengine.server.routes.taxonomy import finite
from guardengine.text.spans import Span

Json = dict[str, Any]
SpanOf = Callable[[Label], Span | None]


def label_json(label: Label, span: Span | None = None, *, shift: int = 0, with_scores: bool = True) -> Json:
    """One label. Characters are Unicode code points of the reply's text, bytes those of its UTF-8; null for what was
    not fed as text. shift: characters, of a byte each, that stand before the text that spans count from."""
    found: Json = {
        "position": label.position,
        "token_id": label.token_id,
        "risk": label.risk,
        "category": label.category,
        "span": span_json(span, shift),
    }
    if with_scores:
        found["risk_probs"] = {name: finite(p) for name, p in label.risk_probs.items()}
        found["category_probs"] = {name: finite(p) for name, p in label.category_probs.items()}
    return found


def prompt_json(label: Label | None) -> Json | None:
    """The label of a user turn, which is of the whole turn."""
    if label is None:
        return None
    found = label_json(label)
    del found["span"]
    return found


def span_json(span: Span | None, shift: int = 0) -> Json | None:
    return None if span is None else {name: value + shift for name, value in span._asdict().items()}


def verdict_json(verdict: Verdict) -> Json:
    return {name: getattr(verdict, name) for name in Verdict.__slots__}


def flagged_json(
    labels: Iterable[Label], spans: Iterable[Span | None], policy: Policy, shift: int
) -> list[Json]:
    """Runs of tokens in a row that are hits of one risk and category, as pieces of the text."""
    runs: list[Json] = []
    last: Json | None = None
    for label, span in zip(labels, spans, strict=True):
        risk = policy.hit(label)
        if risk is None:
            last = None
            continue
        here = span_json(span, shift)
        if last is not None and (last["risk"], last["category"]) == (risk, label.category):
            last["num_tokens"] += 1
            if here and last["span"]:
                last["span"] |= {name: here[name] for name in ("end_char", "end_byte")}
            continue
        last = {
            "risk": risk,
            "category": label.category,
            "position": label.position,
            "num_tokens": 1,
            "span": here,
        }
        runs.append(last)
    return runs
