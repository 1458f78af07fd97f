"""SGLang's Engine.async_generate, as deltas for `guarded`; a reply that is not wanted any more is aborted.

    outputs = deltas(llm, prompt, {"max_new_tokens": 512})  # llm = sglang.Engine(...)
    async for text in guarded(outputs, stream):
        ...

Closing what async_generate returns does not end a request, so `deltas` calls abort_request. Needs no sglang itself.
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
    """What each output of one request adds: text, or with yields="ids" a list of ids of the LLM's vocabulary (pass
    guarded its `tokenizer`, unless that is Qwen3's).

    llm: a sglang.Engine. prompt or input_ids, sampling_params and options: as async_generate takes them. rid: the
    request's id, one that begins no other's, as SGLang aborts by prefix; made up by default. incremental: whether the
    engine was started with incremental_streaming_output; else its outputs repeat the text before them, and `deltas`
    cuts that off. The request is aborted when this is closed, cancelled or fails before its end. Raises ConfigError
    for several prompts or completions, and what the engine raises.
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
