"""SGLang's Engine.async_generate as deltas for `guarded`. The request of a reply that was stopped is aborted.

    outputs = deltas(llm, prompt, {"max_new_tokens": 512})  # llm = sglang.Engine(...)
    async for text in guarded(outputs, stream):
        ...

Closing the generator of async_generate does not end a request, so `deltas` calls abort_request. This module does not
need sglang itself.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Literal

from guardengine.errors import ConfigError


async def deltas(
    llm: Any,
    prompt: str | None = None,
    sampling_params: Mapping[str, Any] | None = None,
    *,
    input_ids: list[int] | None = None,
    rid: str | None = None,
    yields: Literal["text", "ids"] = "text",
    incremental: bool = False,
    **options: Any,
) -> AsyncGenerator[str | list[int], None]:
    """What each output of one request adds to the reply. The request is aborted when this generator is closed,
    cancelled or fails before its end.

    Args:
        llm: A sglang.Engine.
        prompt: One prompt as text. Either this or `input_ids`.
        sampling_params: Sampling parameters of async_generate; n must be 1.
        input_ids: One prompt as ids of the LLM's vocabulary.
        rid: The id of the request. It must not be the beginning of another request's id, because SGLang aborts by
            prefix. None: a random one.
        yields: "text", or "ids" for lists of ids of the LLM's vocabulary. For ids pass the LLM's `tokenizer` to
            `guarded`, unless it is Qwen3's.
        incremental: Whether the engine was started with incremental_streaming_output. Without it outputs repeat the
            text before them, which `deltas` removes.
        **options: Further arguments of async_generate.

    Yields:
        Non-empty texts or lists of ids.

    Raises:
        ConfigError: Several prompts or completions were asked for, or `yields` is another word.
    """
    if not isinstance(prompt, str | None) or (input_ids and not isinstance(input_ids[0], int)):
        raise ConfigError("several prompts were given; a stream guards one reply: call deltas for each")
    if (num := (sampling_params or {}).get("n", 1)) != 1:
        raise ConfigError(f"n={num}; a stream guards one reply: ask for n=1")
    if yields not in ("text", "ids"):
        raise ConfigError(f"yields={yields!r}: choose 'text' or 'ids'")
    rid = f"guardengine-{uuid.uuid4().hex}" if rid is None else rid
    name, num_seen, has_ended = "text" if yields == "text" else "output_ids", 0, False
    outputs = await llm.async_generate(
        prompt=prompt,
        input_ids=input_ids,
        sampling_params=None if sampling_params is None else dict(sampling_params),
        rid=rid,
        stream=True,
        **options,
    )
    try:
        async for output in outputs:
            # Now, and a copy: the engine appends to the same list of ids while later outputs are made.
            whole = output[name] or output[name][:0]
            delta, num_seen = (whole[:], 0) if incremental else (whole[num_seen:], len(whole))
            if delta:
                yield delta
        has_ended = True
    finally:
        if not has_ended:
            llm.tokenizer_manager.abort_request(rid=rid)
        await outputs.aclose()
