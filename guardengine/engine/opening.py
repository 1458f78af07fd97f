"""Opening: what a stream is opened with. Engine.open and AsyncEngine.open take the same, and both make one of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guardengine.core.text_feeding import LONG_CHARS
from guardengine.errors import ConfigError
from guardengine.labels import Role
from guardengine.policy import Policy
from guardengine.text.chat_template import ChatTemplate

Messages = Sequence[Mapping[str, Any]]

_NO_TOKENIZER = (
    "the checkpoint folder has no tokenizer.json, so text cannot be rendered; "
    "add Qwen3's tokenizer.json to it, or pass token ids"
)


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


def require_chat(chat: ChatTemplate | None) -> ChatTemplate:
    """A checkpoint's template. Raises ConfigError where it has none."""
    if chat is None:
        raise ConfigError(_NO_TOKENIZER)
    return chat
