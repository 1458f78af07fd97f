"""POST /v1/moderations, in OpenAI's schema, and POST /v1/guard, which judges a whole conversation."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastapi import APIRouter, Request

from guardengine.engine.async_engine import AsyncEngine
from guardengine.errors import GuardEngineError, Overloaded
from guardengine.labels import Moderation, Role, Verdict
from guardengine.policy import Policy
from guardengine.server import json_values, taxonomy
from guardengine.server.refusals import Refusal, refusal_of
from guardengine.server.replies import AsciiJson
from guardengine.server.schemas import (
    GuardRequest,
    GuardResponse,
    ModerationRequest,
    ModerationResponse,
    joined_text,
    plain_messages,
)
from guardengine.server.service import Service, service_of, tenant_of

router = APIRouter()
Messages = Sequence[Mapping[str, Any]]


class Options(NamedTuple):
    """For whom and how conversations are judged, as in `AsyncEngine.moderate_many`."""

    policy: Policy
    tenant: str
    timeout_s: float | None = None
    spans: bool = False


@router.post("/v1/moderations", response_model=ModerationResponse)
async def moderations(body: ModerationRequest, request: Request) -> AsciiJson:
    """Judge texts as prompts of a user, one result each. Parts of content, [{"type": "text", ...}], are one text.

    A category's score is the probability that the text is unsafe and of that category. Where `flagged` is true,
    `categories` has the category that the model names. Nothing is returned unless all texts were judged.
    """
    service = service_of(request)
    engine = service.stream_engine(body.model)
    texts, is_list = _texts(body, service.settings.max_inputs)
    policy = service.settings.policy if body.policy is None else body.policy.policy()
    conversations = [[{"role": "user", "content": text}] for text in texts]
    found: list[Moderation] = []
    for start in range(0, len(conversations), service.settings.max_parallel):
        part = conversations[start : start + service.settings.max_parallel]
        params = [f"input[{start + i}]" if is_list else "input" for i in range(len(part))]
        found += await _judge(service, engine, part, params, Options(policy, tenant_of(request)))
    results = [_result(judged, policy, body.taxonomy or service.settings.taxonomy) for judged in found]
    for judged in found:
        _count(service, judged)
    return AsciiJson(
        {"id": f"modr-{secrets.token_hex(12)}", "model": service.settings.model_name, "results": results}
    )


@router.post("/v1/guard", response_model=GuardResponse)
async def guard(body: GuardRequest, request: Request) -> AsciiJson:
    """Judge a whole conversation: its last user turn, and the reply to it where it ends with one.

    `response` is the policy's verdict on the reply's labels alone, `verdict` the verdict on everything; its rule shows
    tokens that got no label (error, timeout, overload). Spans count Unicode code points and UTF-8 bytes of the reply's
    content; they are null for a reply with reasoning.
    """
    service = service_of(request)
    engine = service.stream_engine(body.model)
    policy = service.settings.policy if body.policy is None else body.policy.policy()
    messages = plain_messages(body.messages)
    options = Options(policy, tenant_of(request), body.timeout_s, spans=True)
    [judged] = await _judge(service, engine, [messages], ["messages"], options)
    _count(service, judged)
    num_reply = len(judged.labels)
    return AsciiJson(
        {
            "id": f"guard-{secrets.token_hex(12)}",
            "object": "guard.result",
            "created": int(time.time()),
            "model": service.settings.model_name,
            "prompt": json_values.prompt_json(judged.prompt),
            "response": _reply(judged, policy, body.labels) if messages[-1]["role"] == "assistant" else None,
            "verdict": json_values.verdict_json(_verdict(judged)),
            "usage": {
                "prompt_tokens": judged.num_tokens - num_reply,
                "completion_tokens": num_reply,
                "total_tokens": judged.num_tokens,
            },
        }
    )


def _texts(body: ModerationRequest, max_inputs: int) -> tuple[list[str], bool]:
    """The texts to judge, and whether they came as a list."""
    given = body.input
    if isinstance(given, str):
        return [given], False
    texts = [part for part in given if isinstance(part, str)]
    parts = [part for part in given if not isinstance(part, str)]
    if parts:
        return [joined_text(parts, "input")], False
    if not 1 <= len(texts) <= max_inputs:
        raise Refusal(
            400,
            f"input has {len(texts)} texts; send 1 to max_inputs={max_inputs} at a time",
            "too_many_inputs" if texts else "invalid_text",
            param="input",
        )
    return texts, True


def _result(judged: Moderation, policy: Policy, names: str) -> dict[str, Any]:
    label = judged.prompt
    if label is None or not judged.is_complete:
        raise Refusal(
            503,
            "the model failed on a text; see /health",
            "model_failed",
            type="server_error",
            retry_after_s=1,
        )
    is_flagged = _verdict(judged).action != "allow"
    flags: dict[str, Any] = taxonomy.flags(label, is_flagged)
    scores: dict[str, Any] = taxonomy.scores(label, policy)
    if names == "openai":
        flags, scores = taxonomy.as_openai(flags, False), taxonomy.as_openai(scores, 0.0)
    return {
        "flagged": is_flagged,
        "categories": flags,
        "category_scores": scores,
        "category_applied_input_types": {name: ["text"] for name in flags},
        "risk": label.risk,
        "category": label.category,
        "risk_probs": {name: taxonomy.finite(p) for name, p in label.risk_probs.items()},
        "category_probs": {name: taxonomy.finite(p) for name, p in label.category_probs.items()},
    }


def _reply(judged: Moderation, policy: Policy, which: str) -> dict[str, Any]:
    spans = judged.spans or []
    shown = [
        json_values.label_json(label, span)
        for label, span in zip(judged.labels, spans, strict=True)
        if which == "all" or (which == "flagged" and policy.hit(label) is not None)
    ]
    return {
        "verdict": json_values.verdict_json(policy.judge(judged.labels)),
        "labels": shown,
        "flagged": json_values.flagged_json(judged.labels, spans, policy),
    }


def _count(service: Service, judged: Moderation) -> None:
    metrics, verdict = service.metrics, _verdict(judged)
    metrics.prompt_tokens.inc(judged.num_tokens - len(judged.labels))
    metrics.generation_tokens.inc(len(judged.labels))
    metrics.request_success.labels("stop" if judged.is_complete else "abort").inc()
    role: Role = "user" if judged.response is None or verdict.rule.startswith("prompt") else "assistant"
    metrics.judged(verdict, role)


def _verdict(judged: Moderation) -> Verdict:
    if judged.verdict is None:
        raise RuntimeError("the engine has made no verdict of a conversation")
    return judged.verdict


async def _judge(
    service: Service,
    engine: AsyncEngine,
    conversations: Sequence[Messages],
    params: Sequence[str],
    options: Options,
) -> list[Moderation]:
    """Judge conversations, by names of where in the request each was given. Raises Refusal for one that is unfit."""
    retry_after_s, found = service.settings.retry_after_s, list[Moderation]()
    try:
        answers = await engine.moderate_many(conversations, **options._asdict(), on_unfit="return")
    except Overloaded:
        raise
    except GuardEngineError as error:
        raise refusal_of(error, retry_after_s, params[0]) from error
    for answer, param in zip(answers, params, strict=True):
        if not isinstance(answer, Moderation):
            raise refusal_of(answer, retry_after_s, param) from answer
        found.append(answer)
    return found
