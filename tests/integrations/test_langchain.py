"""GuardedChatModel: LangChain's own fake models under guard, as a chain and an agent call them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableBinding
from langchain_models import BAD, BAD_USER, BEFORE, GOOD, GuardedModels, Tooled, gather
from serving import Served, served

from guardengine.errors import Blocked, ConfigError, InvalidText
from guardengine.integrations.langchain import GuardedChatModel


@pytest.fixture(scope="module")
def server(checkpoints) -> Iterator[Served]:
    with served(checkpoints(dtype="float32")) as server:
        yield server


@pytest.fixture
def guarded(server, monkeypatch) -> GuardedModels:
    return GuardedModels(server, monkeypatch)


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


def test_a_model_needs_a_guard(guarded) -> None:
    with pytest.raises(ConfigError):
        GuardedChatModel(model=GenericFakeChatModel(messages=iter(())), guard="http://x")
