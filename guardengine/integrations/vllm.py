"""vLLM's AsyncLLM.generate, with SamplingParams(output_kind=RequestOutputKind.DELTA).

    outputs = generate(llm, prompt, params, request_id)
    async for text in guarded(outputs, stream, text=delta_text):
        ...

When the reply is blocked `outputs` is closed, which aborts the request. Other output kinds are not supported: their
outputs repeat the text before them. This module does not need vllm itself.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from guardengine.errors import ConfigError


async def generate(
    llm: Any, prompt: Any, sampling_params: Any, request_id: str, **options: Any
) -> AsyncGenerator[Any, None]:
    """Call `llm.generate`, and abort the request when this generator is closed, cancelled or fails before its end.

    vLLM's own generator aborts a request only when somebody closes it.

    Args:
        llm: A vllm AsyncLLM.
        prompt: The prompt, in any form that vLLM takes.
        sampling_params: A SamplingParams with output_kind=RequestOutputKind.DELTA.
        request_id: An id of this request alone.
        **options: Further arguments of AsyncLLM.generate.

    Yields:
        vLLM's RequestOutputs.
    """
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
    """The text that an output adds to the reply, for guarded(..., text=delta_text).

    Args:
        output: A vllm RequestOutput.

    Raises:
        ConfigError: The output has several completions. A stream guards one reply.
    """
    text: str | None = _only(output).text
    return text


def delta_ids(output: Any) -> list[int]:
    """The ids that an output adds to the reply, for guarded(..., ids=delta_ids).

    For an LLM whose tokenizer is not Qwen3's pass its tokenizer to `guarded` as well.

    Args:
        output: A vllm RequestOutput.

    Raises:
        ConfigError: The output has several completions. A stream guards one reply.
    """
    return list(_only(output).token_ids)


def _only(output: Any) -> Any:
    if len(output.outputs) != 1:
        raise ConfigError(
            f"the output has {len(output.outputs)} completions; ask for n=1: a stream guards one reply"
        )
    return output.outputs[0]
