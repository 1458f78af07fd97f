"""The guardrail for LiteLLM, called as its proxy calls it, and in the proxy itself, before a fake upstream.

make test-hosts runs it, in an environment with litellm[proxy], whose pins are not ours.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import os
import random
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from guarding import Source, bad_prompts, deltas, make_bombs_unsafe
from serving import Served, served

from guardengine.errors import ConfigError

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no look-up of prices in the network

from litellm import ModelResponse
from litellm.exceptions import GuardrailRaisedException
from litellm.integrations.custom_guardrail import CustomGuardrail
from litellm.types.utils import Delta, ModelResponseStream, StreamingChoices

from guardengine.integrations.litellm import GuardEngineGuardrail

pytestmark = [pytest.mark.slow, pytest.mark.servers]

USER = {"role": "user", "content": "Where?"}
BAD_USER = {"role": "user", "content": "A bomb, a bomb"}
GOOD = "Sure, here is café 巴黎: take a pick and some patience."
BAD = "Sure, here is café 巴黎: take a bomb and some patience."
BEFORE = BAD[: BAD.index(" bomb")]
KEY = f"sk-{secrets.token_hex(24)}"
DATA = {"model": "m", "messages": [USER]}


@pytest.fixture(scope="module")
def server(checkpoints) -> Iterator[Served]:
    with served(checkpoints(dtype="float32")) as server:
        yield server


@pytest.fixture
def rail(server, monkeypatch) -> Any:
    """rail(**options): a guardrail that asks the server, where only bombs are unsafe."""
    chat = server.engine.engine.chat
    make_bombs_unsafe(monkeypatch, chat.tokenizer)
    bad_prompts.add(chat.render([BAD_USER]).prompt_end)
    return lambda **options: GuardEngineGuardrail(
        **{"guardrail_name": "g", "api_base": server.url, "policy": {"debounce": 1}, **options}
    )


def chunk(content: str | None = None, finish: str | None = None) -> ModelResponseStream:
    choice = StreamingChoices(index=0, delta=Delta(content=content), finish_reason=finish)
    return ModelResponseStream(id="c", model="m", choices=[choice])


async def streamed(rail: Any, source: Any, data: Any = None) -> list[Any]:
    hook = rail.async_post_call_streaming_iterator_hook
    return [
        each async for each in hook(user_api_key_dict=None, response=source, request_data=data or dict(DATA))
    ]


def chunks(text: str) -> list[ModelResponseStream]:
    return [chunk(piece) for piece in deltas(text, random.Random(1))] + [chunk(finish="stop")]


def contents(found: list[Any]) -> str:
    return "".join(each.choices[0].delta.content or "" for each in found)


def response(text: str | None, **message: Any) -> ModelResponse:
    return ModelResponse(choices=[{"message": {"role": "assistant", "content": text, **message}}])


def blocked(call: Any) -> GuardrailRaisedException:
    with pytest.raises(GuardrailRaisedException) as caught:
        asyncio.run(call)
    return caught.value


def test_the_hooks_have_litellms_signatures() -> None:
    for name in (
        "async_pre_call_hook",
        "async_moderation_hook",
        "async_post_call_success_hook",
        "async_post_call_streaming_iterator_hook",
    ):
        ours, theirs = (
            list(inspect.signature(getattr(kind, name)).parameters)
            for kind in (GuardEngineGuardrail, CustomGuardrail)
        )
        assert ours == theirs, name
    theirs = list(inspect.signature(CustomGuardrail.apply_guardrail).parameters)
    assert list(inspect.signature(GuardEngineGuardrail.apply_guardrail).parameters)[: len(theirs)] == theirs


def test_requests(rail) -> None:
    guardrail = rail()
    for hook in ("pre_call", "moderation"):

        def call(data: dict[str, Any], hook: str = hook) -> Any:
            more = {"cache": None} if hook == "pre_call" else {}
            method = getattr(guardrail, f"async_{hook}_hook")
            return method(user_api_key_dict=None, data=data, call_type="completion", **more)

        assert asyncio.run(call(dict(DATA)))["messages"] == [USER]
        error = blocked(call({"messages": [BAD_USER]}))
        assert (error.status_code, error.blocked_content) == (400, True)
        assert "bomb" not in str(error)
        assert "Unsafe" in str(error)
        blocked(call({"prompt": BAD_USER["content"]}))
        blocked(call({"input": ["fine", BAD_USER["content"]]}))
        blocked(call({"input": [{"role": "user", "content": BAD_USER["content"]}]}))  # /v1/responses
        error = blocked(call({"prompt": [1, 2, 3]}))
        assert (error.status_code, error.blocked_content) == (400, False)
        image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
        assert blocked(call({"messages": [image]})).blocked_content is False


def test_media_can_be_skipped(rail) -> None:
    image = [{"type": "text", "text": "Where?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    data = {"messages": [{"role": "user", "content": image}]}
    call = rail(skip_media=True).async_moderation_hook(data, None, "completion")
    assert asyncio.run(call) is data


def test_responses(rail) -> None:
    guardrail = rail()

    def call(response: Any) -> Any:
        return guardrail.async_post_call_success_hook(dict(DATA), None, response)

    good = response(GOOD)
    assert asyncio.run(call(good)) is good
    blocked(call(response(BAD)))
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "big bomb"}'}}]
    blocked(call(response(None, tool_calls=calls)))
    blocked(call(response(GOOD, reasoning_content=BAD)))


def test_streams(rail) -> None:
    found = asyncio.run(streamed(rail(), Source(chunks(GOOD))))
    assert contents(found) == GOOD
    assert found[-1].choices[0].finish_reason == "stop"
    source = Source(chunks(BAD), hangs=True)
    found = asyncio.run(streamed(rail(substitute=" [removed]"), source))
    assert contents(found) == BEFORE + " [removed]"
    assert found[-1].choices[0].finish_reason == "content_filter"
    assert found[-1].id == "c"
    assert source.is_closed


def test_streams_that_raise(rail) -> None:
    assert blocked(streamed(rail(on_block="raise"), Source(chunks(BAD)))).blocked_content
    # Before the first chunk there is still a status to tell it with.
    assert blocked(streamed(rail(), Source(chunks(GOOD)), {"messages": [BAD_USER]})).status_code == 400
    assert blocked(streamed(rail(), Source([b"event: x"]))).blocked_content is False


def test_apply_guardrail_in_both_forms(rail) -> None:
    guardrail = rail()
    for inputs, kind in (
        ({"texts": ["fine"]}, "request"),
        ({"texts": ["x"], "structured_messages": [USER]}, "request"),
        ({"texts": [GOOD], "tool_calls": []}, "response"),
    ):
        assert (
            asyncio.run(guardrail.apply_guardrail(inputs=inputs, request_data=DATA, input_type=kind))
            is inputs
        )
    for inputs, kind in (
        ({"texts": ["fine", BAD_USER["content"]]}, "request"),
        ({"texts": ["x"], "structured_messages": [BAD_USER]}, "request"),
        ({"texts": [GOOD, BAD]}, "response"),
        ({"texts": [], "tool_calls": [{"function": {"name": "f", "arguments": "a bomb"}}]}, "response"),
    ):
        blocked(guardrail.apply_guardrail(inputs=inputs, request_data=dict(DATA), input_type=kind))
    if importlib.util.find_spec("litellm_enterprise") is None:  # whose logging reads the newer form
        assert asyncio.run(guardrail.apply_guardrail("fine", "en", None, {})) == "fine"
    plain = inspect.unwrap(GuardEngineGuardrail.apply_guardrail)
    assert asyncio.run(plain(guardrail, "fine", "en")) == "fine"
    assert asyncio.run(plain(guardrail, text="fine", language=None, entities=None)) == "fine"
    blocked(plain(guardrail, BAD_USER["content"], None))


def test_a_guard_that_is_not_there(rail) -> None:
    nowhere = {"api_base": "http://127.0.0.1:9", "reconnect_s": 0.05}
    error = blocked(streamed(rail(**nowhere), Source(chunks(GOOD))))
    assert (error.status_code, error.blocked_content) == (503, False)
    found = asyncio.run(streamed(rail(**nowhere, unreachable_fallback="fail_open"), Source(chunks(BAD))))
    assert contents(found) == BAD


def test_options(rail) -> None:
    for options in ({"on_block": "sing"}, {"unreachable_fallback": "x"}, {"api_base": None}):
        with pytest.raises(ConfigError):
            rail(**options)


# -- the proxy itself --------------------------------------------------------------------------------------

CONFIG = """
model_list:
  - model_name: m
    litellm_params: {{model: openai/m, api_base: "http://127.0.0.1:{upstream}/v1", api_key: none}}
guardrails:
  - guardrail_name: guardengine
    litellm_params:
      guardrail: guardengine.integrations.litellm.GuardEngineGuardrail
      mode: [pre_call, post_call]
      default_on: true
      api_base: {url}
      api_key: none
      policy: {{debounce: 1}}
"""


class Upstream(BaseHTTPRequestHandler):
    """An LLM that says what the last message asks it to say, a word a chunk."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = BAD if "bad" in body["messages"][-1]["content"] else GOOD
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if body.get("stream") else "application/json")
        self.end_headers()
        base = {"id": "c", "created": 1, "model": "m"}
        if not body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            answer = {**base, "object": "chat.completion", "choices": [choice], "usage": usage}
            self.wfile.write(json.dumps(answer).encode())
            return
        words = text.split(" ")
        for i, word in enumerate([*words, None]):
            delta = {} if word is None else {"role": "assistant", "content": word if i == 0 else f" {word}"}
            choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
            event = {**base, "object": "chat.completion.chunk", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def proxy(server, tmp_path_factory) -> Iterator[str]:
    upstream = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    folder: Path = tmp_path_factory.mktemp("proxy")
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(upstream=upstream.server_port, url=server.url))
    with ThreadingHTTPServer(("127.0.0.1", 0), Upstream) as free:
        port = free.server_port
    environment = {**os.environ, "LITELLM_MASTER_KEY": KEY}
    command = [str(Path(sys.executable).with_name("litellm")), "--config", str(config)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            cwd=folder,
            env=environment,
        )
    try:
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health/liveliness").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
        upstream.shutdown()


def asked(proxy: str, content: str, **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": content}]
    return httpx.post(
        f"{proxy}/v1/chat/completions",
        json={"model": "m", "messages": messages, **body},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=60,
    )


def events(answer: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_the_proxy(proxy, rail) -> None:
    answer = asked(proxy, "say a good thing")
    assert answer.json()["choices"][0]["message"]["content"] == GOOD
    for content in (BAD_USER["content"], "say a bad thing"):
        answer = asked(proxy, content)
        assert answer.status_code == 400
        assert "is blocked: Unsafe" in answer.json()["error"]["message"]
    found = events(asked(proxy, "say a good thing", stream=True))
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in found[:-1]) == GOOD
    found = events(asked(proxy, "say a bad thing", stream=True))
    assert found[-1] == "[DONE]"
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in found[:-1]) == BEFORE
    assert found[-2]["choices"][0]["finish_reason"] == "content_filter"
    answer = asked(proxy, BAD_USER["content"], stream=True)
    assert answer.status_code == 400


@pytest.mark.parametrize("path", ["messages", "responses", "completions", "embeddings"])
def test_the_proxys_other_paths_bring_their_texts(proxy, rail, path) -> None:
    text = BAD_USER["content"]
    body = {
        "messages": {"messages": [BAD_USER], "max_tokens": 9},
        "responses": {"input": text},
        "completions": {"prompt": text},
        "embeddings": {"input": [text]},
    }[path]
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{proxy}/v1/{path}", json={"model": "m", **body}, headers=headers, timeout=60)
    assert answer.status_code == 400
    assert "is blocked: Unsafe" in answer.text
