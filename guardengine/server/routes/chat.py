"""POST /v1/chat/completions for a Gen checkpoint: the answer that vLLM or SGLang give for it with greedy decoding, in
the same format."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from guardengine.labels import GenModeration
from guardengine.server.refusals import Refusal
from guardengine.server.replies import AsciiJson
from guardengine.server.routes.gen_answer import Answer, Tokenizer, answer_of, guard_json, logprobs_of
from guardengine.server.schemas import ChatRequest, plain_messages
from guardengine.server.service import Service, service_of

router = APIRouter()


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """The Gen checkpoint's answer about the last message: "Safety: ...", "Categories: ...", and for a reply "Refusal:
    ...". Sampling options are accepted and change nothing: the answer is always the likeliest one.

    `guard` in the choice is the parsed answer, with probabilities and the policy's verdict. With `stream` the answer
    comes line by line. logprobs: see `logprobs_of` in gen_answer.py.
    """
    service = service_of(request)
    engine: Any = service.gen_engine(body.model)
    if body.n not in (None, 1):
        raise Refusal(400, f"n={body.n}: the likeliest answer is one; send n=1", "invalid_option", param="n")
    if body.tools:
        raise Refusal(
            400, "tools: Qwen3Guard-Gen calls none; leave them out", "invalid_option", param="tools"
        )
    policy = service.settings.policy if body.policy is None else body.policy.policy()
    found: list[GenModeration] = await engine.moderate_many(
        [plain_messages(body.messages)], policy, mode=body.mode or service.settings.gen_mode
    )
    tokenizer: Tokenizer = engine.engine.chat.tokenizer
    answer = answer_of(found[0], tokenizer, body.max_completion_tokens or body.max_tokens)
    _count(service, answer)
    completion = _Completion(body, service.settings.gen_model_name, answer, tokenizer)
    if body.stream:
        return StreamingResponse(completion.frames(), media_type="text/event-stream", headers=_NO_BUFFERING)
    return AsciiJson(completion.whole())


_NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class _Completion:
    """An answer in the formats of OpenAI's API."""

    def __init__(self, body: ChatRequest, model: str, answer: Answer, tokenizer: Tokenizer) -> None:
        self._body, self._answer = body, answer
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._logprobs = logprobs_of(answer, tokenizer, body.top_logprobs or 0) if body.logprobs else None

    def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        choice = self._choice(
            0, len(self._answer.tokens), message={"role": "assistant", "content": self._answer.text}
        )
        choice |= {"finish_reason": self._answer.finish_reason, "guard": guard_json(self._answer.found)}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage()}

    async def frames(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        yield self._frame([self._choice(0, 0, delta={"role": "assistant", "content": ""})])
        at = 0
        for line in self._answer.lines:
            yield self._frame([self._choice(at, at + len(line), delta={"content": "".join(line)})])
            at += len(line)
        last = self._choice(at, at, delta={})
        last |= {"finish_reason": self._answer.finish_reason, "guard": guard_json(self._answer.found)}
        yield self._frame([last])
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield self._frame([], usage=self._usage())
        yield "data: [DONE]\n\n"

    def _frame(self, choices: list[dict[str, Any]], **more: Any) -> str:
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(chunk, allow_nan=False)}\n\n"

    def _choice(self, start: int, end: int, **content: Any) -> dict[str, Any]:
        """A choice with the log probabilities of the tokens from `start` to `end`."""
        logprobs = None if self._logprobs is None or end == start else {"content": self._logprobs[start:end]}
        return {"index": 0, **content, "logprobs": logprobs, "finish_reason": None}

    def _usage(self) -> dict[str, int]:
        prompt, answer = self._answer.found.num_prompt_tokens, self._answer.num_tokens
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _count(service: Service, answer: Answer) -> None:
    found, metrics = answer.found, service.metrics
    metrics.prompt_tokens.inc(found.num_prompt_tokens)
    metrics.generation_tokens.inc(found.num_answer_tokens)
    metrics.request_success.labels(answer.finish_reason).inc()
    metrics.judged(found.verdict, found.role)
