"""Opening: what a stream is opened with. Engine.open and AsyncEngine.open take the same, and both make one of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guardengine.core.text_feeding import LONG_CHARS
from guardengine.labels import Role
from guardengine.policy import Policy

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Opening:
    """The arguments of `Engine.open`, which says what each means. Nothing is checked here."""

    messages: Messages | None
    token_ids: Sequence[int] | None
    role: Role
    policy: Policy | None
    stream_id: str | None
    tenant: str
    cache_salt: str | None
    priority: int
    timeout_s: float | None

    @property
    def is_long(self) -> bool:
        """Whether there is so much text that it should be rendered beside the engine's thread."""
        messages = self.messages
        if not isinstance(messages, list | tuple):
            return False
        texts = (text for each in messages if isinstance(each, Mapping) for text in each.values())
        return sum(len(text) for text in texts if isinstance(text, str)) > LONG_CHARS
