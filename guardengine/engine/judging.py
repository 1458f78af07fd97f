"""Moderating conversations of which some may not be fit for it: the others still get their answers, in one batch.

The way through is written once, as a generator that asks for batches and is sent answers, or thrown errors, for
engines of either kind.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from guardengine.errors import GuardEngineError, InvalidTokens, StreamTooLong
from guardengine.labels import GenModeration, Moderation
from guardengine.policy import Policy

Conversation = Sequence[Mapping[str, Any]]
Answer = Moderation | GenModeration
Unfit = InvalidTokens | StreamTooLong  # what a conversation itself is to blame for
T = TypeVar("T")
Batches = Generator[list[Conversation], Sequence[Answer], T]


class Moderator(Protocol):
    """What of an Engine is needed here."""

    def moderate_many(self, conversations: Any, policy: Policy | None = None) -> Any: ...


class AsyncModerator(Protocol):
    """What of an AsyncEngine is needed here."""

    async def moderate_many(self, conversations: Any, policy: Policy | None = None) -> Any: ...


def judge_each(conversations: list[Conversation]) -> Batches[list[Answer | Unfit]]:
    """Ask for all at once; when one is unfit, for halves, until each that is stands alone. Answers in order, or the
    error of the conversation itself. Other errors pass."""
    if not conversations:
        return []
    try:
        answers = yield conversations
    except (InvalidTokens, StreamTooLong) as error:
        if len(conversations) == 1:
            return [error]
    else:
        return list(answers)
    middle = len(conversations) // 2
    first = yield from judge_each(conversations[:middle])
    return first + (yield from judge_each(conversations[middle:]))


def run(batches: Batches[T], engine: Moderator, policy: Policy | None = None) -> T:
    """Answer a generator's batches with `engine.moderate_many`; returns what it returns."""
    try:
        batch = next(batches)
        while True:
            try:
                answers = engine.moderate_many(batch, policy)
            except GuardEngineError as error:
                batch = batches.throw(error)
            else:
                batch = batches.send(answers)
    except StopIteration as stop:
        value: T = stop.value
        return value


async def run_async(batches: Batches[T], engine: AsyncModerator, policy: Policy | None = None) -> T:
    """The same with an AsyncEngine."""
    try:
        batch = next(batches)
        while True:
            try:
                answers = await engine.moderate_many(batch, policy)
            except GuardEngineError as error:
                batch = batches.throw(error)
            else:
                batch = batches.send(answers)
    except StopIteration as stop:
        value: T = stop.value
        return value
