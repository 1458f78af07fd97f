"""Guard vLLM's AsyncLLM in one process: python examples/vllm_guarded.py LLM GUARD_CHECKPOINT PROMPT"""

import asyncio
import sys
import uuid

from transformers import AutoTokenizer
from vllm import AsyncEngineArgs, SamplingParams  # pip install vllm
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from guardengine import AsyncEngine, guarded
from guardengine.integrations.vllm import delta_text, generate


async def main(model, checkpoint, prompt):
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model))
    messages = [{"role": "user", "content": prompt}]
    tokenizer = AutoTokenizer.from_pretrained(model)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    params = SamplingParams(max_tokens=512, output_kind=RequestOutputKind.DELTA)
    async with AsyncEngine.from_pretrained(checkpoint) as engine, await engine.open(messages) as stream:
        outputs = generate(llm, rendered, params, uuid.uuid4().hex)
        async for text in guarded(outputs, stream, text=delta_text, substitute=" [removed]"):
            print(text, end="", flush=True)  # a block aborts the request
        print("\n", stream.verdict)
    llm.shutdown()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
