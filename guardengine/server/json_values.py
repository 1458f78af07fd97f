"""Labels, verdicts and spans as JSON values, for HTTP, WebSocket and the command line. Imports no web framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from guardengine.labels import Label, Verdict
from guardengine.policy import Policy
from guardengine.server.taxonomy import finite
from guardengine.text.spans import Span

Json = dict[str, Any]
SpanOf = Callable[[Label], Span | None]


def label_json(label: Label, span: Span | None = None, *, with_scores: bool = True) -> Json:
    """A label as a JSON object. Its span counts characters (Unicode code points) and UTF-8 bytes of the reply's text;
    it is null for a token that was not fed as text.

    Args:
        label: The label.
        span: The place of its token in the text.
        with_scores: Include the probabilities.
    """
    value: Json = {
        "position": label.position,
        "token_id": label.token_id,
        "risk": label.risk,
        "category": label.category,
        "span": span_json(span),
    }
    if with_scores:
        value["risk_probs"] = {name: finite(p) for name, p in label.risk_probs.items()}
        value["category_probs"] = {name: finite(p) for name, p in label.category_probs.items()}
    return value


def prompt_json(label: Label | None) -> Json | None:
    """The label of a user turn as a JSON object. It has no span, because it is about the whole turn."""
    if label is None:
        return None
    value = label_json(label)
    del value["span"]
    return value


def span_json(span: Span | None) -> Json | None:
    """A span as a JSON object."""
    return None if span is None else span._asdict()


def verdict_json(verdict: Verdict) -> Json:
    """A verdict as a JSON object."""
    return {name: getattr(verdict, name) for name in Verdict.__slots__}


def flagged_json(labels: Iterable[Label], spans: Iterable[Span | None], policy: Policy) -> list[Json]:
    """The flagged pieces of a reply: runs of tokens that are hits of the same risk and category."""
    runs: list[Json] = []
    last: Json | None = None
    for label, span in zip(labels, spans, strict=True):
        risk = policy.hit(label)
        if risk is None:
            last = None
            continue
        here = span_json(span)
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
