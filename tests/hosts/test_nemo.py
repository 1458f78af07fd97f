"""Rails for NeMo Guardrails, in the real package with its fake LLM.

make test-hosts runs it, in an environment with nemoguardrails, whose pins are not ours.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guarding import bad_prompts, make_bombs_unsafe
from nemoguardrails import LLMRails, RailsConfig
from nemoguardrails.testing import FakeLLMModel
from serving import Served, served

from guardengine.integrations.guard import Guard
from guardengine.integrations.nemo import actions, register, stream_guarded

pytestmark = [pytest.mark.slow, pytest.mark.servers]

FOLDER = Path(__file__).parents[2] / "examples" / "nemo_config"
USER = {"role": "user", "content": "Where?"}
BAD_USER = {"role": "user", "content": "A bomb, a bomb"}
GOOD = "Sure, here is café 巴黎: take a pick and some patience."
BAD = "Sure, here is café 巴黎: take a bomb and some patience."
BEFORE = BAD[: BAD.index(" bomb")]
REFUSAL = "I'm sorry, I can't respond to that."


@pytest.fixture(scope="module")
def server(checkpoints) -> Iterator[Served]:
    with served(checkpoints(dtype="float32")) as server:
        yield server


@pytest.fixture(autouse=True)
def bombs(server, monkeypatch) -> None:
    """Only bombs are unsafe, and prompts that end where BAD_USER's does."""
    chat = server.engine.engine.chat
    make_bombs_unsafe(monkeypatch, chat.tokenizer)
    bad_prompts.add(chat.render([BAD_USER]).prompt_end)
    monkeypatch.setenv("GUARDENGINE_URL", server.url)


def guard(server: Served, **options: Any) -> Guard:
    return Guard(server.url, policy={"debounce": 1}, **options)


def rails(server: Served, *replies: str, own: bool = True, **streaming: Any) -> LLMRails:
    """The example's configuration. own: with a guard that blocks at the first hit."""
    config = RailsConfig.from_path(str(FOLDER))
    if streaming:
        config.rails.output.streaming = config.rails.output.streaming.model_copy(update=streaming)
    app = LLMRails(config, llm=FakeLLMModel(responses=list(replies)))
    if own:
        register(app, guard(server))
    return app


def test_whole_replies(server) -> None:
    def reply(text: str, *messages: dict[str, str]) -> str:
        return rails(server, text).generate(messages=list(messages))["content"]

    assert reply(GOOD, USER) == GOOD
    assert reply(BAD, USER) == REFUSAL
    assert reply(GOOD, BAD_USER) == REFUSAL
    # The example as it is loads and asks the server, whose own policy wants two hits in a row.
    assert rails(server, BAD, own=False).generate(messages=[USER])["content"] == BAD


async def streamed(chunks: Any) -> tuple[str, Any]:
    found = [chunk async for chunk in chunks]
    error = json.loads(found.pop())["error"] if found and '"error"' in found[-1] else None
    return "".join(found), error


@pytest.mark.parametrize("size", [4, 50])
def test_windows(server, size) -> None:
    def stream(text: str, *messages: dict[str, str]) -> Any:
        async def main() -> Any:
            app = rails(server, text, enabled=True, chunk_size=size, context_size=2, stream_first=False)
            return await streamed(app.stream_async(messages=list(messages)))

        return asyncio.run(main())

    assert stream(GOOD, USER) == (GOOD, None)
    text, error = stream(BAD, USER)
    assert BEFORE.startswith(text)
    assert (error["code"], error["param"]) == ("content_blocked", "guardengine check output")
    text, error = stream(GOOD, BAD_USER)  # the refusal is a reply to a bad prompt
    assert (text, error["code"]) == ("", "content_blocked")


def test_whole_streams(server) -> None:
    def stream(text: str, *messages: dict[str, str], **options: Any) -> Any:
        async def main() -> Any:
            app = rails(server, text, enabled=False)
            app.config.rails.output.flows = []
            return await streamed(stream_guarded(app, guard(server), list(messages), **options))

        return asyncio.run(main())

    assert stream(GOOD, {"role": "context", "content": {"a": 1}}, USER) == (GOOD, None)
    text, error = stream(BAD, USER)
    assert text == BEFORE
    assert error["code"] == "content_blocked"
    text, error = stream(GOOD, BAD_USER)
    assert (text, error["code"]) == ("", "content_blocked")


def test_what_is_judged_and_told(server, monkeypatch) -> None:
    seen: list[Any] = []
    asked = Guard.judge

    async def judge(self: Guard, messages: Any, reply: Any = None) -> Any:
        seen.append((messages, reply))
        return await asked(self, messages, reply)

    monkeypatch.setattr(Guard, "judge", judge)
    talk = [USER, {"role": "assistant", "content": "There."}, {"role": "user", "content": "And then what?"}]
    assert rails(server, GOOD).generate(messages=talk)["content"] == GOOD
    assert seen == [(talk, None), (talk, GOOD)]
    check_input, check_output = actions(guard(server))
    assert check_input.action_meta["name"] == "guardengine_check_input"
    outcome = asyncio.run(check_output(context={"user_message": "Where?", "bot_message": BAD}))
    assert outcome.is_blocked
    assert outcome.metadata["rule"] == "debounce"
    assert not asyncio.run(check_input(user_message="Where?")).is_blocked


@pytest.mark.parametrize("parallel", [False, True])
def test_a_guard_that_is_not_there_blocks_also_in_parallel(server, parallel) -> None:
    async def main(on_unreachable: str) -> Any:
        app = rails(server, GOOD, enabled=True, chunk_size=4, context_size=1, stream_first=False)
        app.config.rails.output.parallel = parallel
        app.config.rails.input.flows = []
        register(app, Guard("http://127.0.0.1:9", reconnect_s=0.01, on_unreachable=on_unreachable))
        return await streamed(app.stream_async(messages=[USER]))

    text, error = asyncio.run(main("closed"))
    assert (text, error["code"]) == ("", "content_blocked")
    assert asyncio.run(main("open")) == (GOOD, None)
