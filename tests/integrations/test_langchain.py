"""GuardedChatModel: LangChain's own fake models under guard, as a chain and an agent call them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from guarding import bad_prompts, make_bombs_unsafe
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableBinding
from serving import Served, served

from guardengine.errors import Blocked, ConfigError, InvalidText
from guardengine.integrations.guard import Guard
from guardengine.integrations.langchain import GuardedChatModel

GOOD = "Sure, here is café 巴黎: take a pick and some patience."
BAD = "Sure, here is café 巴黎: take a bomb and some patience."
BEFORE = BAD[: BAD.index(" bomb")]
BAD_USER = {"role": "user", "content": "A bomb, a bomb"}


class Tooled(FakeMessagesListChatModel):
    """A fake that takes tools, keeps what it was called with, and cannot stream."""

    seen: list[Any] = []  # noqa: RUF012 - pydantic copies it

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self.bind(tools=[{"name": getattr(tool, "name", None) or tool.__name__} for tool in tools])

    def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((messages, kwargs))
        return super()._generate(messages, *args, **kwargs)


@pytest.fixture(scope="module")
def server(checkpoints) -> Iterator[Served]:
    with served(checkpoints(dtype="float32")) as server:
        yield server


@pytest.fixture
def guarded(server, monkeypatch) -> Any:
    chat = server.engine.engine.chat
    make_bombs_unsafe(monkeypatch, chat.tokenizer)
    bad_prompts.add(chat.render([BAD_USER]).prompt_end)
    guard = Guard(server.url, policy={"debounce": 1})

    def make(*replies: Any, **options: Any) -> GuardedChatModel:
        messages = [AIMessage(content=r) if isinstance(r, str) else r for r in replies]
        options.setdefault("model", GenericFakeChatModel(messages=iter(messages)))
        return GuardedChatModel(guard=guard, **options)

    return make


async def gather(chunks: Any) -> list[Any]:
    return [chunk async for chunk in chunks]


def whole(chunks: list[Any]) -> Any:
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    return total


@pytest.mark.parametrize("sync", [False, True])
def test_streams(guarded, sync) -> None:
    def stream(model: Any, prompt: str) -> list[Any]:
        return list(model.stream(prompt)) if sync else asyncio.run(gather(model.astream(prompt)))

    chunks = stream(guarded(GOOD), "Where?")
    assert len(chunks) > 5
    assert whole(chunks).content == GOOD
    found = whole(stream(guarded(BAD, substitute=" [removed]"), "Where?"))
    assert found.content == BEFORE + " [removed]"
    assert found.response_metadata["finish_reason"] == "content_filter"
    assert found.response_metadata["guardengine"]["risk"] == "Unsafe"
    model = guarded(GOOD)
    assert whole(stream(model, BAD_USER["content"])).content == ""
    assert next(model.model.messages).content == GOOD  # nobody has asked it
    with pytest.raises(Blocked):
        stream(guarded(BAD, on_block="raise"), "Where?")


@pytest.mark.parametrize("sync", [False, True])
def test_whole_replies(guarded, sync) -> None:
    def invoke(model: Any, prompt: Any) -> Any:
        return model.invoke(prompt) if sync else asyncio.run(model.ainvoke(prompt))

    talk = [SystemMessage("Be kind."), HumanMessage("Where?"), AIMessage("There."), HumanMessage("And then?")]
    assert invoke(guarded(GOOD), talk).content == GOOD
    found = invoke(guarded(BAD, substitute="No."), talk)
    assert (found.content, found.response_metadata["finish_reason"]) == ("No.", "content_filter")
    assert invoke(guarded(GOOD, substitute="No."), BAD_USER["content"]).content == "No."
    with pytest.raises(Blocked, match="the reply is blocked: Unsafe"):
        invoke(guarded(BAD, on_block="raise"), talk)
    image = HumanMessage([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}])
    with pytest.raises(InvalidText):
        invoke(guarded(GOOD), [image])
    assert invoke(guarded(GOOD, skip_media=True), [image, *talk]).content == GOOD


def test_callbacks_see_only_what_is_cleared(guarded) -> None:
    """LangGraph streams an agent's tokens to its reader from such events."""

    async def events() -> str:
        model = guarded(BAD) | StrOutputParser()
        found = await gather(model.astream_events("Where?", version="v2"))
        return "".join(e["data"]["chunk"].content for e in found if e["event"] == "on_chat_model_stream")

    assert asyncio.run(events()) == BEFORE


def test_a_synchronous_call_inside_a_loop(guarded) -> None:
    async def main() -> str:
        return "".join(chunk.content for chunk in guarded(BAD).stream("Where?"))

    assert asyncio.run(main()) == BEFORE


def test_tools(guarded) -> None:
    def look_up(query: str) -> str:
        """Look something up."""
        return query

    call = {"name": "look_up", "args": {"query": "x"}, "id": "1"}
    bad = {"name": "look_up", "args": {"query": "a bomb"}, "id": "1"}
    fake = Tooled(responses=[AIMessage("", tool_calls=[call]), AIMessage("", tool_calls=[bad])])
    model = guarded(model=fake).bind_tools([look_up])
    assert isinstance(model, RunnableBinding)
    assert model.invoke("Where?").tool_calls[0]["args"] == {"query": "x"}
    assert fake.seen[0][1]["tools"] == [{"name": "look_up"}]
    found = model.invoke("Where?")
    assert (found.tool_calls, found.response_metadata["finish_reason"]) == ([], "content_filter")
    for expected in ([call["args"]], []):  # as streams
        found = whole(asyncio.run(gather(model.astream("Where?"))))
        assert [each["args"] for each in found.tool_calls] == expected


def test_an_agent_streams_only_what_is_cleared(guarded) -> None:
    agents = pytest.importorskip("langchain.agents", reason="langchain is not installed; its core is")
    call = {"name": "look_up", "args": {"query": "x"}, "id": "1"}

    def look_up(query: str) -> str:
        """Look something up."""
        return query

    async def tokens() -> str:
        fake = Tooled(responses=[AIMessage("", tool_calls=[call]), AIMessage(BAD)])
        agent = agents.create_agent(guarded(model=fake), tools=[look_up])
        found = await gather(agent.astream({"messages": [("user", "Where?")]}, stream_mode="messages"))
        return "".join(chunk.content for chunk, _ in found if chunk.type in ("ai", "AIMessageChunk"))

    assert asyncio.run(tokens()) == BEFORE


def test_a_model_needs_a_guard(guarded) -> None:
    with pytest.raises(ConfigError):
        GuardedChatModel(model=GenericFakeChatModel(messages=iter(())), guard="http://x")
