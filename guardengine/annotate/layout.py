"""Layout: the columns of a data set that are judged, and a row as a conversation. Knows no files and no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guardengine.errors import ConfigError
from guardengine.text.messages import ROLES

Messages = list[dict[str, str]]

# Names of columns that are recognized when the user names none.
PROMPT_COLUMNS = ("prompt", "question", "instruction", "query", "user_prompt", "text")
RESPONSE_COLUMNS = ("response", "completion", "answer", "output", "assistant_response")
MESSAGES_COLUMNS = ("messages", "conversation", "conversations")
_MESSAGE_KEYS = ("role", "content", "reasoning_content")
_CALL_KEYS = ("tool_calls", "function_call")


class BadRow(Exception):
    """A row cannot be judged; the message says why."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns that are judged: either messages, or prompt and perhaps response.

    Attributes:
        prompt: The column with the user's text.
        response: The column with the assistant's text.
        messages: The column with whole conversations.
    """

    prompt: str | None = None
    response: str | None = None
    messages: str | None = None

    @property
    def columns(self) -> list[str]:
        return [name for name in (self.messages, self.prompt, self.response) if name is not None]

    def __str__(self) -> str:
        if self.messages is not None:
            return f"messages in {self.messages!r}"
        if self.response is None:
            return f"prompts in {self.prompt!r}"
        return f"prompts in {self.prompt!r}, responses in {self.response!r}"


def choose_layout(named: Layout, columns: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> Layout:
    """The layout that the options name, or the one that the names of the columns and the values of the sample suggest.

    Args:
        named: The columns that the user named. A prompt column alone is judged alone.
        columns: All columns of the data set.
        sample: Some rows.

    Raises:
        ConfigError: A named column does not exist, or several columns could be meant.
    """
    if named.messages is not None and (named.prompt is not None or named.response is not None):
        raise ConfigError(
            f"--messages-column {named.messages} already has whole conversations; leave out --prompt-column and "
            "--response-column"
        )
    for name in named.columns:
        if name not in columns:
            raise ConfigError(f"there is no column {name!r}; the columns are {_listed(columns)}")
    if named.messages is not None or named.prompt is not None:
        return named
    if named.response is None:
        messages = _candidate("messages", MESSAGES_COLUMNS, columns, sample, _is_conversation)
        if messages is not None:
            return Layout(messages=messages)
    prompt = _candidate("prompt", PROMPT_COLUMNS, columns, sample, lambda value: isinstance(value, str))
    if prompt is None:
        raise ConfigError(
            f"none of the columns {_listed(columns)} is known to have prompts or messages; name it with "
            "--prompt-column (and --response-column) or --messages-column"
        )
    response = named.response or _candidate(
        "response", RESPONSE_COLUMNS, columns, sample, lambda value: isinstance(value, str)
    )
    return Layout(prompt=prompt, response=response)


def conversation_of(layout: Layout, record: Mapping[str, Any]) -> Messages:
    """A row as messages. Raises BadRow; the engine may still refuse the messages."""
    if layout.messages is not None:
        return _conversation(layout.messages, _cell(record, layout.messages))
    messages: Messages = []
    for name, role in ((layout.prompt, "user"), (layout.response, "assistant")):
        if name is not None:
            text = _cell(record, name)
            messages.append({"role": role, "content": _text(f"column {name!r}", text)})
            if not text.strip():
                raise BadRow(f"column {name!r} is empty")
    return messages


def _cell(record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        raise BadRow(f"there is no column {name!r}")
    if record[name] is None:
        raise BadRow(f"column {name!r} is null")
    return record[name]


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where} is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{where} has a lone surrogate at character {error.start}, so it is not valid Unicode"
        ) from None
    return value


def _conversation(name: str, value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise BadRow(f"column {name!r} is {_kind(value)}, not a list of messages")
    messages: Messages = []
    for index, message in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(message, dict):
            raise BadRow(f"{where} is {_kind(message)}, not an object with role and content")
        for key in _CALL_KEYS:
            if message.get(key):
                raise BadRow(f"{where} has {key!r}, which is not text and would not be judged")
        for key in ("role", "content"):
            if message.get(key) is None:
                raise BadRow(f"{where}: {key!r} is null")
        messages.append(
            {
                key: _text(f"{where}: {key!r}", message[key])
                for key in _MESSAGE_KEYS
                if message.get(key) is not None
            }
        )
        if messages[-1]["role"] not in ROLES:
            raise BadRow(f"{where}: role is {messages[-1]['role'][:60]!r}, not one of {', '.join(ROLES)}")
    if not messages[-1]["content"].strip():
        raise BadRow(f"{name}[{len(messages) - 1}], which is judged, is empty")
    return messages


def _candidate(
    what: str,
    names: Sequence[str],
    columns: Sequence[str],
    sample: Sequence[Mapping[str, Any]],
    fits: Callable[[Any], bool],
) -> str | None:
    found = [name for name in names if name in columns and any(fits(row.get(name)) for row in sample)]
    if len(found) > 1:
        raise ConfigError(
            f"the columns {_listed(found)} may each be the {what}; name the right one with --{what}-column"
        )
    return found[0] if found else None


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and any(
        isinstance(message, dict) and "role" in message and "content" in message for message in value
    )


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return f"an empty {type(value).__name__}" if value in ("", [], {}) else type(value).__name__


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:20]))
    return (f"{shown}, ..." if len(names) > 20 else shown) or "(none)"
