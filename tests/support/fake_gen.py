"""Engines that read their answers off the text, for what asks engines about conversations."""

from __future__ import annotations

import asyncio
from typing import Any

from guardengine import GenModeration, Policy, Verdict
from guardengine.errors import StreamTooLong


class FakeGen:
    """A Gen checkpoint that reads its answers off the text: "Unsafe", "Controversial", "refuse"; "long" it cannot read.
    Both kinds of engine."""

    def __init__(self) -> None:
        self.asked: list[list[Any]] = []
        self.policies: list[Policy | None] = []

    def moderate_many(
        self, conversations: Any, policy: Policy | None = None, *, on_unfit: str = "raise"
    ) -> list[Any]:
        self.asked.append([list(messages) for messages in conversations])
        self.policies.append(policy)
        if on_unfit == "raise" and any("too long" in messages[-1]["content"] for messages in conversations):
            raise StreamTooLong("9000 tokens")
        return [self.answer(messages[-1]["content"]) for messages in conversations]

    def answer(self, text: str) -> Any:
        if "too long" in text:
            return StreamTooLong("9000 tokens")
        safety = next((s for s in ("Unsafe", "Controversial", "Unparsable") if s in text), "Safe")
        refusal = None if "cut" in text else "Yes" if "refuse" in text else "No"
        verdict = Verdict("allow", "Safe", None, None, "none", 0)
        return GenModeration("assistant", safety, (), refusal, {}, {}, {}, text, verdict, 1, 1)


class AsyncFakeGen(FakeGen):
    async def moderate_many(  # type: ignore[override]
        self, conversations: Any, policy: Policy | None = None, *, on_unfit: str = "raise"
    ) -> list[Any]:
        await asyncio.sleep(0)
        return super().moderate_many(conversations, policy, on_unfit=on_unfit)
