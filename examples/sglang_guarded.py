"""Guard SGLang's Engine in one process: python examples/sglang_guarded.py LLM GUARD_CHECKPOINT PROMPT"""

import asyncio
import sys

import sglang  # pip install sglang, on a machine with a GPU

from guardengine import AsyncEngine, guarded
from guardengine.integrations.sglang import deltas


async def main(model, checkpoint, prompt):
    llm = sglang.Engine(model_path=model)
    messages = [{"role": "user", "content": prompt}]
    rendered = llm.tokenizer_manager.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    async with AsyncEngine.from_pretrained(checkpoint) as engine, await engine.open(messages) as stream:
        outputs = deltas(llm, rendered, {"max_new_tokens": 512})
        async for text in guarded(outputs, stream, substitute=" [removed]"):  # a block aborts the request
            print(text, end="", flush=True)
        print("\n", stream.verdict)
    llm.shutdown()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
