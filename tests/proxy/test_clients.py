"""The official client, unchanged, before the proxy; a real LLM, if a tiny one, behind it; the command as it is run."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
import torch
from guarding import bad_prompts
from proxying import DONE, HANG, USER, Proxied, chunk, completion, http, proxied, sse
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import guardengine
from guardengine import Policy

pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.usefixtures("bombs_are_unsafe")]

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


class Llm(NamedTuple):
    url: str
    model: str


@pytest.fixture(scope="module")
def llm(folder, tmp_path_factory) -> Iterator[Llm]:
    """transformers' own server, with a random Qwen3."""
    model = tmp_path_factory.mktemp("llm")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>")
    tokenizer.chat_template = (Path(guardengine.__file__).parent / "text" / "qwen3_chat.jinja").read_text()
    tokenizer.save_pretrained(model)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    config = Qwen3Config(
        vocab_size=151936, num_attention_heads=2, num_key_value_heads=2, eos_token_id=151645, **sizes
    )
    Qwen3ForCausalLM(config).save_pretrained(model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", model, "--host", "127.0.0.1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu"], stderr=subprocess.DEVNULL, env=environment
    ) as process:
        try:
            url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
            while not is_healthy(url):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.2)
            yield Llm(url, str(model))
        finally:
            process.kill()


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.HTTPError:
        return False


def test_a_real_llm(folder, llm, monkeypatch) -> None:
    """What it says comes out whole, and with a policy that hits its words is cut before the first of them."""
    options: dict[str, Any] = {"model": llm.model, "messages": [USER], "max_tokens": 24}
    direct = openai.OpenAI(base_url=f"{llm.url}/v1", api_key="any", max_retries=0, timeout=60)
    said = read(direct.chat.completions.create(**options, stream=True))
    assert said[1] == "length"
    with proxied(folder, llm) as proxy:
        client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="any", max_retries=0, timeout=60)
        ask = client.chat.completions.create
        *chunks, last = ask(**options, stream=True)
        assert read([*chunks, last]) == said
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (10, 24)
        assert len(said[0]) > 24
        whole = ask(**options)
        assert (
            whole.choices[0].message.content
            == direct.chat.completions.create(**options).choices[0].message.content
        )
        label = 9  # this many tokens are fine

        def hit(self: Policy, label_: Any) -> str | None:
            return "Unsafe" if label_.role == "assistant" and label_.position > first + label else None

        first = proxy.engine.engine.chat.render([USER]).prompt_end
        monkeypatch.setattr(Policy, "hit", hit)
        cut, reason = read(ask(**options, stream=True))
        assert reason == "content_filter"
        assert said[0].startswith(cut)
        assert 0 < len(cut) < len(said[0])


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
