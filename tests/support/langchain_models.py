"""LangChain's own fake models, plain and under guard."""

from __future__ import annotations

from typing import Any

import pytest
from guarding import bad_prompts, make_bombs_unsafe
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage
from serving import Served

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


class GuardedModels:
    """GuardedModels(server, monkeypatch)(*replies, **options): a model whose server finds only bombs unsafe."""

    def __init__(self, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        chat = server.engine.engine.chat
        make_bombs_unsafe(monkeypatch, chat.tokenizer)
        bad_prompts.add(chat.render([BAD_USER]).prompt_end)
        self.guard = Guard(server.url, policy={"debounce": 1})

    def __call__(self, *replies: Any, **options: Any) -> GuardedChatModel:
        messages = [AIMessage(content=r) if isinstance(r, str) else r for r in replies]
        options.setdefault("model", GenericFakeChatModel(messages=iter(messages)))
        return GuardedChatModel(guard=self.guard, **options)


async def gather(chunks: Any) -> list[Any]:
    return [chunk async for chunk in chunks]
