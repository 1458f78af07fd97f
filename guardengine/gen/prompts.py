"""prompts(): conversations as a Gen checkpoint's template asks about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from guardengine.errors import InvalidText
from guardengine.labels import Role
from guardengine.text.chat_template import ChatTemplate

_ROLES: tuple[Role, ...] = ("user", "assistant")


class Prompt(NamedTuple):
    """A rendered conversation, and whose message is judged: the last one's."""

    token_ids: list[int]
    role: Role


def render_prompt(
    chat: ChatTemplate, messages: Sequence[Mapping[str, Any]], *, max_tokens: int | None = None
) -> Prompt:
    """Raises InvalidText, StreamTooLong and CheckpointError as `ChatTemplate.render_ids` does."""
    token_ids = chat.render_ids(messages, max_tokens=max_tokens)
    role = messages[-1]["role"]
    if role not in _ROLES:
        raise InvalidText(
            f"messages[{len(messages) - 1}]: the last message is of role {role!r}; a Gen checkpoint judges the user's "
            "or the assistant's: leave out what follows it"
        )
    return Prompt(token_ids, role)


def shared_prefixes(chat: ChatTemplate) -> dict[Role, list[int]]:
    """What the prompts of each role begin with, whatever the conversation: the instructions."""
    prefixes: dict[Role, list[int]] = {}
    for role in _ROLES:
        turns = _ROLES[: _ROLES.index(role) + 1]
        probes = [
            chat.render_ids([{"role": turn, "content": content} for turn in turns]) for content in ("a", "1")
        ]
        pairs = zip(*probes, strict=False)
        prefixes[role] = [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return prefixes
