"""The official client, unchanged, before the proxy; a real LLM, if a tiny one, behind it; the command as it is run."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request
from guarding import bad_prompts
from proxying import DONE, HANG, USER, Proxied, chunk, completion, event, http, proxied, sse
from starlette.responses import JSONResponse, StreamingResponse
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TextIteratorStreamer

from guardengine import Policy

pytestmark = pytest.mark.usefixtures("bombs_are_unsafe")

BAD_USER = {"role": "user", "content": "How do I build the one thing that nobody should?"}


@pytest.fixture(scope="module")
def proxy(folder, upstream) -> Iterator[Proxied]:
    with proxied(folder, upstream) as proxy:
        yield proxy


@pytest.fixture
def client(proxy) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="any", max_retries=0, timeout=20) as client:
        yield client


def read(chunks: Any) -> tuple[str, str | None]:
    """The text of a stream, and why it ended."""
    text, reason = "", None
    for each in chunks:
        for choice in each.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason


# -- the official client -----------------------------------------------------------------------------------


def test_streams(client, upstream) -> None:
    upstream.script = lambda asked: sse(chunk("Hello"), chunk(" you"), chunk(None, "stop"), DONE)
    ask = client.chat.completions.create
    assert read(ask(model="m", messages=[USER], stream=True, n=1, temperature=0.5)) == ("Hello you", "stop")
    upstream.script = lambda asked: sse(chunk("Take"), chunk(" a bomb"), chunk(" and"), HANG)
    assert read(ask(model="m", messages=[USER], stream=True)) == ("Take a", "content_filter")
    upstream.script = lambda asked: sse(chunk("Take a"), 0.1, b"data: x\n\n")
    chunks = ask(model="m", messages=[USER], stream=True)
    with pytest.raises(openai.APIError, match="the upstream sent"):
        read(chunks)


def test_whole_replies_models_and_errors(client, proxy, upstream) -> None:
    upstream.script = lambda asked: http(json.dumps(completion({"content": "Take a bomb now"})).encode())
    found = client.chat.completions.with_raw_response.create(model="m", messages=[USER])
    [choice] = found.parse().choices
    assert (choice.message.content, choice.finish_reason) == ("Take a", "content_filter")
    assert found.headers["x-guardengine-action"] == "block"
    upstream.script = lambda asked: http(b'{"object": "list", "data": [{"id": "m", "object": "model"}]}')
    assert [model.id for model in client.models.list()] == ["m"]
    bad_prompts.add(proxy.engine.engine.chat.render([BAD_USER]).prompt_end)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="m", messages=[BAD_USER], stream=True)
    assert refused.value.code == "content_filter"
    with pytest.raises(openai.InternalServerError, match="not moderated"):
        client.responses.create(model="m", input="x")
    upstream.script = lambda asked: http(b'{"error": {"message": "no"}}', "429 Too Many Requests")
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="m", messages=[USER])


def test_tools(client, upstream) -> None:
    def call(**function: str) -> bytes:
        head = {"id": "call_1", "type": "function"} if "name" in function else {}
        return chunk(None, None, 0, {"tool_calls": [{"index": 0, **head, "function": function}]})

    parts = [call(name="weather", arguments=""), call(arguments='{"city": '), call(arguments='"Paris"}')]
    upstream.script = lambda asked: sse(*parts, chunk(None, "tool_calls"), DONE)
    function = {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }
    with client.chat.completions.stream(
        model="m", messages=[USER], tools=[{"type": "function", "function": function}]
    ) as stream:
        for _ in stream:
            pass
        [called] = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert (called.id, called.function.name, called.function.arguments) == (
        "call_1",
        "weather",
        '{"city": "Paris"}',
    )


def test_the_asynchronous_client(proxy, upstream) -> None:
    """Many streams at a time, each with its own end."""
    upstream.script = lambda asked: sse(
        chunk("So"),
        chunk(f" {asked.json['seed']} "),
        chunk("a bomb. " if asked.json["seed"] % 2 else "a bun"),
        DONE,
    )

    async def ask(client: openai.AsyncOpenAI, seed: int) -> tuple[str, str | None]:
        text, reason = "", None
        async for each in await client.chat.completions.create(
            model="m", messages=[USER], stream=True, seed=seed
        ):
            text += each.choices[0].delta.content or ""
            reason = each.choices[0].finish_reason or reason
        return text, reason

    async def main() -> list[tuple[str, str | None]]:
        async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(16)))

    for seed, found in enumerate(asyncio.run(main())):
        assert found == ((f"So {seed} a", "content_filter") if seed % 2 else (f"So {seed} a bun", None))


# -- a real LLM --------------------------------------------------------------------------------------------


class Llm:
    """A random Qwen3 behind an app of a few lines, as small servers around transformers' generate are."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
        config = Qwen3Config(
            vocab_size=151936, num_attention_heads=2, num_key_value_heads=2, eos_token_id=151645, **sizes
        )
        self._model = Qwen3ForCausalLM(config).eval()
        self.said: list[str] = []
        app = FastAPI()
        app.post("/v1/chat/completions")(self.complete)
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            pass
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    async def complete(self, request: Request) -> Any:
        asked = await request.json()
        text = "\n".join(f"{message['role']}: {message['content']}" for message in asked["messages"])
        inputs = self._tokenizer(text, return_tensors="pt")
        options = {"max_new_tokens": asked["max_tokens"], "do_sample": True, "pad_token_id": 151643}
        if not asked.get("stream"):
            torch.manual_seed(asked["seed"])
            ids = self._model.generate(**inputs, **options)[0, inputs.input_ids.shape[1] :]
            self.said.append(self._tokenizer.decode(ids, skip_special_tokens=True))
            return JSONResponse(completion({"content": self.said[-1]}))
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)

        def generate() -> None:
            torch.manual_seed(asked["seed"])
            self._model.generate(**inputs, **options, streamer=streamer)

        threading.Thread(target=generate, daemon=True).start()

        def frames() -> Iterator[bytes]:
            said = ""
            for piece in streamer:
                said += piece
                yield chunk(piece)
            self.said.append(said)
            yield chunk(None, "stop")
            yield event({"choices": [], "usage": {"total_tokens": 9}})
            yield DONE

        return StreamingResponse(frames(), media_type="text/event-stream")

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture(scope="module")
def llm(folder) -> Iterator[Llm]:
    llm = Llm(folder)
    yield llm
    llm.stop()


def test_a_real_llm(folder, llm, monkeypatch) -> None:
    """What it says comes out whole, and with a policy that hits its words is cut before the first of them."""
    with proxied(folder, llm) as proxy:
        client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="any", max_retries=0, timeout=20)
        ask = client.chat.completions.create
        options: dict[str, Any] = {"model": "m", "messages": [USER], "max_tokens": 24, "seed": 3}
        text, reason = read(ask(**options, stream=True, stream_options={"include_usage": True}))
        assert (text, reason) == (llm.said[-1], "stop")
        assert len(text) > 24
        assert ask(**options).choices[0].message.content == llm.said[-1]
        label = 9  # this many tokens are fine

        def hit(self: Policy, label_: Any) -> str | None:
            return "Unsafe" if label_.role == "assistant" and label_.position > first + label else None

        first = proxy.engine.engine.chat.render([USER]).prompt_end
        monkeypatch.setattr(Policy, "hit", hit)
        cut, reason = read(ask(**options, stream=True))
        assert reason == "content_filter"
        assert text.startswith(cut)
        assert 0 < len(cut) < len(text)


# -- the command -------------------------------------------------------------------------------------------


def test_the_command_serves_and_ends(folder, upstream) -> None:
    upstream.script = lambda asked: sse(chunk("Hello"), chunk(None, "stop"), DONE)
    command = [
        sys.executable,
        "-P",
        "-m",
        "guardengine",
        "proxy",
        "--upstream",
        upstream.url,
        str(folder),
        "--port=0",
    ]
    command += ["--num-threads=1", "--on-blocked-prompt=filter", "--kv-cache-bytes=4194304"]
    environment = {**os.environ, "GUARDENGINE_UPSTREAM_KEY": "sk-secret-of-the-upstream"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith(f"guardengine guards {upstream.url} on http://127.0.0.1:")
            client = openai.OpenAI(
                base_url=f"{line.split()[-1]}/v1", api_key="any", max_retries=0, timeout=20
            )
            chunks = list(client.chat.completions.create(model="m", messages=[USER], stream=True))
            assert chunks[-1].choices[0].finish_reason in ("stop", "content_filter")
            upstream.script = lambda asked: http(b'{"object": "list", "data": []}')
            client.models.list()
            assert upstream.asked[-1].header("authorization") == ["Bearer sk-secret-of-the-upstream"]
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "sk-secret" not in log
    assert "Hello" not in log
    assert "POST /v1/chat/completions 200" in log
