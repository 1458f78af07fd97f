"""What the proxy says itself: the end of a reply that is cut, refusals, verdicts in headers and comments, errors."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from guardengine.labels import Label, Verdict
from guardengine.proxy.settings import OnBlock, ProxySettings
from guardengine.server import json_values
from guardengine.server.refusals import Refusal

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"
_HEAD = ("id", "object", "created", "model", "system_fingerprint", "service_tier")


def event(value: Json) -> bytes:
    return b"data: " + json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


def head_of(chunk: Json | None, model: str, kind: str) -> Json:
    """The fields that say whose chunk or completion it is, as in one of the upstream's, or made up."""
    if chunk is not None:
        return {name: chunk[name] for name in _HEAD if name in chunk}
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def ending(style: OnBlock, refusal: str) -> tuple[str | None, str]:
    """What a choice that is blocked says yet, and its finish_reason."""
    return (refusal, "stop") if style == "refuse" else (None, "content_filter")


def end_chunk(head: Json, index: int, settings: ProxySettings) -> bytes:
    """The event that ends one choice that is cut."""
    said, reason = ending(settings.on_block, settings.refusal)
    delta = {} if said is None else {"content": said}
    return event(
        {**head, "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}]}
    )


def blocked_message(style: OnBlock, refusal: str, index: int, kept: Json | None = None) -> Json:
    """A choice of a whole completion in place of one that is blocked. kept: what of its message may be shown."""
    said, reason = ending(style, refusal)
    message = {"role": "assistant", "content": None, **(kept or {})}
    if said is not None:
        message = {"role": "assistant", "content": said}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}


def blocked_error(verdict: Verdict, of: str) -> Json:
    """OpenAI's error shape, with Azure's code."""
    category = "" if verdict.category is None else f", {verdict.category}"
    message = f"the {of} is blocked by the content filter ({verdict.risk}{category}; rule {verdict.rule})"
    return {
        "error": {
            "message": message,
            "type": "invalid_request_error",
            "param": "messages" if of == "prompt" else None,
            "code": "content_filter",
            "guardengine": json_values.verdict_json(verdict),
        }
    }


def unjudged(verdict: Verdict, retry_after_s: float) -> Refusal | None:
    """What to answer where the prompt is blocked only because it was not judged: nobody said that it is unsafe."""
    if verdict.risk != "Unknown":
        return None
    return Refusal(
        503,
        f"the prompt could not be judged ({verdict.rule}); retry",
        f"guard_{verdict.rule}",
        type="server_error",
        retry_after_s=retry_after_s,
    )


def prompt_headers(label: Label | None, verdict: Verdict) -> dict[str, str]:
    """What is known of the prompt, for x-guardengine-prompt-*."""
    found = {"action": verdict.action, "rule": verdict.rule}
    if label is not None:
        found |= {"risk": label.risk, "category": label.category}
    return {f"x-guardengine-prompt-{name}": value for name, value in found.items()}


def reply_headers(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """What became of a whole reply: the worst of its choices."""
    worst = max(verdicts, key=lambda verdict: ("allow", "flag", "block").index(verdict.action))
    found = {
        "action": worst.action,
        "risk": worst.risk,
        "category": worst.category or "",
        "rule": worst.rule,
    }
    return {f"x-guardengine-{name}": value for name, value in found.items() if value}


def comment(prompt: Label | None, verdicts: Sequence[Verdict]) -> bytes:
    """The verdicts, as a server-sent comment: parsers skip it."""
    found = {
        "prompt": json_values.prompt_json(prompt),
        "choices": [
            {"index": index, "verdict": json_values.verdict_json(verdict)}
            for index, verdict in enumerate(verdicts)
        ],
    }
    return b": guardengine " + json.dumps(found, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
