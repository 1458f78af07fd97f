"""Messages: the conversations that a chat template renders, and the checks of their form. Knows no template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from guardengine.errors import InvalidText

ROLES = ("system", "user", "assistant", "tool")

Messages = Sequence[Mapping[str, Any]]


def checked_messages(messages: object, check_text: Callable[[str], None]) -> list[dict[str, str]]:
    """Check the form of messages, and return them with plain strings only.

    Args:
        messages: A non-empty list of mappings with a role of ROLES and content, both str, at least one with the role
            "user". Further values must be str; None values are left out.
        check_text: Raises InvalidText for text that is not valid.

    Raises:
        InvalidText: A message is not valid; the error names it and what to do.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InvalidText(
            f"messages is {_shown(messages)}; pass a non-empty list of mappings with role and content"
        )
    checked = [_checked(index, message, check_text) for index, message in enumerate(messages)]
    if not any(message["role"] == "user" for message in checked):
        raise InvalidText(
            f"none of the {len(checked)} messages has the role 'user'; add the prompt to moderate"
        )
    return checked


def _checked(index: int, message: object, check_text: Callable[[str], None]) -> dict[str, str]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise InvalidText(f"{where} is {_shown(message)}; pass a mapping with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidText(f"{where}: role is {_shown(role)}; use one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise InvalidText(
            f"{where}: content is {_shown(message.get('content'))}; pass a str ('' if it is empty)"
        )
    checked = {}
    for key, value in message.items():
        if value is None:
            continue
        if not isinstance(key, str) or not isinstance(value, str):
            raise InvalidText(
                f"{where}: {key!r} is {_shown(value)}; only text is moderated: put it into content, or leave it out"
            )
        for text in (key, value):
            try:
                check_text(text)
            except InvalidText as error:
                raise InvalidText(f"{where}: {key!r}: {error}") from None
        # Subclasses of str may change what +, split and startswith do, so the template gets none.
        checked[str.__str__(key)] = str.__str__(value)
    return checked


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
