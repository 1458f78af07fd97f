"""LangChain's agents, on a model under guard.

make test-hosts runs it, in an environment with langchain; of that, others have langchain-core.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage
from langchain_models import BAD, BEFORE, GuardedModels, Tooled, gather
from serving import Served, served


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Served]:
    with served(folder) as server:
        yield server


def test_an_agent_streams_only_what_is_cleared(server, monkeypatch) -> None:
    guarded = GuardedModels(server, monkeypatch)
    call = {"name": "look_up", "args": {"query": "x"}, "id": "1"}

    def look_up(query: str) -> str:
        """Look something up."""
        return query

    async def tokens() -> str:
        fake = Tooled(responses=[AIMessage("", tool_calls=[call]), AIMessage(BAD)])
        agent = create_agent(guarded(model=fake), tools=[look_up])
        found = await gather(agent.astream({"messages": [("user", "Where?")]}, stream_mode="messages"))
        return "".join(chunk.content for chunk, _ in found if chunk.type in ("ai", "AIMessageChunk"))

    assert asyncio.run(tokens()) == BEFORE
