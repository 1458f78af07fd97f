"""Chat completions of OpenAI's SDK, and of servers that speak its API.

chunks = await client.chat.completions.create(model=..., messages=messages, stream=True)
async for text in guarded(chunks, stream, text=delta_text):
    ...
"""

from __future__ import annotations

from typing import Any

from guardengine.errors import ConfigError


def delta_text(chunk: Any) -> str | None:
    """The text of a chat.completion.chunk, an object or a dict: choices[0].delta.content. None for chunks without any
    (the role, tool calls, usage). Raises ConfigError for another choice than the first: a stream guards one reply."""
    choices = _get(chunk, "choices")
    if not choices:
        return None
    if index := _get(choices[0], "index"):
        raise ConfigError(
            f"the chunk is of choice {index}; ask for n=1, or guard each choice on its own stream"
        )
    content: str | None = _get(_get(choices[0], "delta"), "content")
    return content


def _get(thing: Any, name: str) -> Any:
    return thing.get(name) if isinstance(thing, dict) else getattr(thing, name, None)
