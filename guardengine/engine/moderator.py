"""Moderator: what of an engine moderates whole conversations, for those who want no more of it. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from guardengine.errors import InvalidTokens, StreamTooLong
from guardengine.labels import GenModeration, Moderation
from guardengine.policy import Policy

Conversation = Sequence[Mapping[str, Any]]
Answer = Moderation | GenModeration
# What a conversation itself is to blame for. InvalidText is a kind of InvalidTokens.
Unfit = InvalidTokens | StreamTooLong
OnUnfit = Literal["raise", "return"]


class Moderator(Protocol):
    """Engine, or what answers as it does."""

    def moderate_many(
        self, conversations: Any, policy: Policy | None = None, *, on_unfit: Any = "raise"
    ) -> Any: ...


class AsyncModerator(Protocol):
    """AsyncEngine, or what answers as it does."""

    async def moderate_many(
        self, conversations: Any, policy: Policy | None = None, *, on_unfit: Any = "raise"
    ) -> Any: ...
