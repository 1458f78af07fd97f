"""vLLM's AsyncLLM.generate, with SamplingParams(output_kind=RequestOutputKind.DELTA).

    outputs = generate(llm, prompt, params, request_id)
    async for text in guarded(outputs, stream, text=delta_text):
        ...

When the reply is blocked `outputs` is closed, which aborts the request. With the other kinds an output repeats those
before it: they are not deltas. Needs no vllm itself.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from guardengine.errors import ConfigError


async def generate(
    llm: Any, prompt: Any, sampling_params: Any, request_id: str, **options: Any
) -> AsyncGenerator[Any, None]:
    """`llm.generate` of an AsyncLLM, of which the request is aborted when this is closed, cancelled or fails before its
    end, also where nobody closes vLLM's own generator. options: as `generate` takes them. Raises what the engine
    raises."""
    outputs, has_ended = llm.generate(prompt, sampling_params, request_id, **options), False
    try:
        async for output in outputs:
            yield output
        has_ended = True
    finally:
        if not has_ended:
            await llm.abort(request_id)
        await outputs.aclose()


def delta_text(output: Any) -> str | None:
    """What a RequestOutput adds to the text, for guarded(..., text=delta_text)."""
    text: str | None = _only(output).text
    return text


def delta_ids(output: Any) -> list[int]:
    """What a RequestOutput adds to the ids, for guarded(..., ids=delta_ids); of an LLM with another tokenizer than
    Qwen3's with guarded's `tokenizer`."""
    return list(_only(output).token_ids)


def _only(output: Any) -> Any:
    if len(output.outputs) != 1:
        raise ConfigError(
            f"the output has {len(output.outputs)} completions; ask for n=1: a stream guards one reply"
        )
    return output.outputs[0]
