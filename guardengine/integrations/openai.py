"""Chat completions of OpenAI's SDK, and of servers and libraries that speak its API.

    chunks = await client.chat.completions.create(model=..., messages=messages, stream=True)
    async for text in guarded(chunks, stream, text=delta_text):
        ...

`delta_text` is all that an application needs. The functions after it are for gateways, which pass whole chunks on: see
`guardengine.integrations.guard`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from guardengine.errors import ConfigError, InvalidText

_ROLES = {"developer": "system", "function": "tool"}  # names that the chat template does not know
_REASONING = ("reasoning_content", "reasoning")  # servers differ


def delta_text(chunk: Any) -> str | None:
    """The text that a chunk adds to the reply, choices[0].delta.content.

    Args:
        chunk: A chat.completion.chunk, as an object of the SDK or as a dict.

    Returns:
        The text; None for chunks without text (the role, tool calls, usage).

    Raises:
        ConfigError: The chunk belongs to another choice than the first. A stream guards one reply.
    """
    content: str | None = _get(_delta(chunk), "content")
    return content


def chunk_text(chunk: Any) -> str | None:
    """Everything in a chunk that a reader or a tool would get: reasoning, content, refusal, and the names and
    arguments of tool calls.

    Args:
        chunk: A chat.completion.chunk, as an object of the SDK or as a dict.

    Returns:
        The texts joined; None for chunks without a delta.

    Raises:
        ConfigError: The chunk belongs to another choice than the first.
    """
    return message_text(_delta(chunk))


def message_text(message: Any) -> str | None:
    """Everything in a finished message that a reader or a tool would get: reasoning, content, refusal, and the names
    and arguments of tool calls.

    Args:
        message: The message of a choice, as an object of the SDK or as a dict; or a delta; or None.

    Returns:
        The texts joined; None for None.
    """
    if message is None:
        return None
    reasoning = next((text for name in _REASONING if (text := _get(message, name))), "")
    return (
        f"{reasoning}{_get(message, 'content') or ''}{_get(message, 'refusal') or ''}{_calls_text(message)}"
    )


def split_chunk(chunk: Any, num_chars: int) -> tuple[Any, Any] | None:
    """Cut a chunk in two, of which the first has the first characters of its content.

    Args:
        chunk: A chat.completion.chunk, as an object of the SDK (a pydantic model).
        num_chars: How many characters of the content the first part gets.

    Returns:
        The two parts; the second also has everything that is not content. None for a chunk that cannot be cut, because
            it has other text than content or is no pydantic model.
    """
    delta = _delta(chunk)
    content = _get(delta, "content")
    if not content or message_text(delta) != content or not hasattr(chunk, "model_copy"):
        return None
    first, rest = chunk.model_copy(deep=True), chunk.model_copy(deep=True)
    first.choices[0].delta.content, rest.choices[0].delta.content = content[:num_chars], content[num_chars:]
    first.choices[0].finish_reason = None
    for part in (first, rest):  # the log probabilities belong to the whole piece
        if _get(part.choices[0], "logprobs") is not None:
            part.choices[0].logprobs = None
    return first, rest


def text_messages(messages: Iterable[Any], *, skip_media: bool = False) -> list[dict[str, str]]:
    """Convert the messages of a request into those that the guard reads: role and content, the content as one text.

    The parts of a content are joined by line breaks, and tool calls follow the content. Names, ids and other fields
    are left out. When no message has the role "user", the last one that is not the assistant's becomes the prompt.

    Args:
        messages: The messages of a request, as objects of the SDK or as dicts.
        skip_media: Leave images, audio and files out, without judging them, instead of refusing the request.

    Returns:
        One dict with role and content for each message.

    Raises:
        InvalidText: A content is neither text nor a list of parts, or it has a part that is not text.
    """
    plain = [_text_message(index, message, skip_media) for index, message in enumerate(messages)]
    if not any(message["role"] == "user" for message in plain):
        others = [message for message in plain if message["role"] != "assistant"]
        if others:
            others[-1]["role"] = "user"
        else:
            plain.insert(0, {"role": "user", "content": ""})
    return plain


def _text_message(index: int, message: Any, skip_media: bool) -> dict[str, str]:
    role, content = _get(message, "role"), _get(message, "content")
    where = f"messages[{index}]"
    if content is None:
        content = ""
    if not isinstance(content, str | list | tuple):
        raise InvalidText(f"{where}.content is {type(content).__name__}; pass a text, or a list of parts")
    if not isinstance(content, str):
        texts = []
        for number, part in enumerate(content):
            text = part if isinstance(part, str) else _get(part, "text")
            if isinstance(text, str):
                texts.append(text)
            elif not skip_media:
                raise InvalidText(
                    f"{where}.content[{number}] is a {_get(part, 'type')!r:.40}, and Qwen3Guard reads text only; send "
                    "text, or let the guard leave such parts unjudged (skip_media)"
                )
        content = "\n".join(texts)
    calls = _calls_text(message)
    return {"role": _ROLES.get(role, role), "content": "\n".join(filter(None, (content, calls)))}


def _calls_text(message: Any) -> str:
    functions = [_get(call, "function") for call in _get(message, "tool_calls") or ()]
    functions.append(_get(message, "function_call"))  # the older form
    return "".join(f"{_get(f, 'name') or ''}{_get(f, 'arguments') or ''}" for f in functions if f is not None)


def _delta(chunk: Any) -> Any:
    choices = _get(chunk, "choices")
    if not choices:
        return None
    if index := _get(choices[0], "index"):
        raise ConfigError(
            f"the chunk is of choice {index}; ask for n=1, or guard each choice on its own stream"
        )
    return _get(choices[0], "delta")


def _get(thing: Any, name: str) -> Any:
    return thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)
