"""What the tests of guarded generation share: sources that are watched, and a policy whose hits are one word."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

from guardengine import AsyncEngine, AsyncStream, Policy
from guardengine.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "Where?"}
BAD_USER = {"role": "user", "content": "bomb"}
END = 151645

bad_prompts: set[int] = set()  # positions at which prompts end that are to be blocked


def make_bombs_unsafe(monkeypatch: Any, tokenizer: Tokenizer) -> None:
    """Whatever random weights say: what is a hit is the token " bomb", and the end of a bad prompt."""
    (bad,) = tokenizer.encode_text(" bomb")
    bad_prompts.clear()

    def hit(self: Policy, label: Any) -> str | None:
        is_bad = label.position in bad_prompts if label.role == "user" else label.token_id == bad
        return "Unsafe" if is_bad else None

    monkeypatch.setattr(Policy, "hit", hit)


async def opened(engine: AsyncEngine, message: dict[str, str] = USER, **policy: Any) -> AsyncStream:
    if message is BAD_USER:  # before the engine may have read it
        await engine.stats()
        bad_prompts.add(engine.engine.chat.render([message]).prompt_end)  # type: ignore[union-attr]
    return await engine.open(messages=[message], policy=Policy.strict(**{"debounce": 1, **policy}))


def deltas(text: Any, rng: random.Random, longest: int = 7) -> list[Any]:
    places = [0]
    while places[-1] < len(text):
        places.append(min(places[-1] + rng.randint(1, longest), len(text)))
    return [text[start:end] for start, end in pairwise(places)]


class Source:
    """An async iterator that is watched: what was pulled, whether it was closed, and in which task."""

    def __init__(self, items: list[Any], error: Exception | None = None, hangs: bool = False) -> None:
        self.items, self.error, self.hangs = items, error, hangs
        self.num_pulled, self.is_closed = 0, False
        self.tasks: set[Any] = set()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._items()

    async def _items(self) -> AsyncIterator[Any]:
        try:
            for item in self.items:
                self.tasks.add(asyncio.current_task())
                self.num_pulled += 1
                yield item
                await asyncio.sleep(0)
            if self.hangs:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
        finally:
            self.tasks.add(asyncio.current_task())
            self.is_closed = True
