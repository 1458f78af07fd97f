"""Long texts are measured beside the engine's thread, which tokenizes what it is given between two steps.

A megabyte that cannot fit would take it more than a second, for which every stream would wait. No web framework.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from guardengine.engine.async_engine import AsyncEngine
from guardengine.errors import StreamTooLong

_LONG = 16_384  # characters, which the engine's thread encodes in 10 to 30 ms


async def check_long(engine: AsyncEngine, texts: Iterable[object]) -> None:
    """Raise StreamTooLong where a long text has more tokens than a stream may. What is no text is left to others."""
    chat, most = engine.engine.chat, engine.engine.core.max_model_len
    if chat is None:
        return
    for text in texts:
        if isinstance(text, str) and len(text) > _LONG:
            ids = await asyncio.to_thread(chat.tokenizer.encode_text, text, max_tokens=most)
            if len(ids) > most:
                raise StreamTooLong(
                    f"a text of {len(ids)} tokens, max_model_len={most}; shorten it, or split the conversation"
                )
