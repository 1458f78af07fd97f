"""Show of an LLM's reply only what is cleared; stop the LLM on a block, or take the reply back and try again."""

import asyncio
import sys

from guardengine import AsyncEngine, Policy, guarded, intervene

REPLY = (
    "Of course. The capital of France is Paris, and it lies on the Seine. Anything else that you would like?"
)


async def llm(text):  # any async iterator of text or token ids; here one that has its words by heart
    for i, word in enumerate(text.split(" ")):
        try:
            yield word if i == 0 else " " + word
        except GeneratorExit:
            print(f"   [the LLM is stopped after {i + 1} words]")
            raise


async def main(checkpoint):
    async with AsyncEngine.from_pretrained(checkpoint, kv_cache_bytes=2**26, max_model_len=1024) as engine:
        messages = [{"role": "user", "content": "Tell me about Paris."}]
        policy = Policy.loose(risk_thresholds={"Unsafe": 0.5}, debounce=1)  # random weights flag much

        async with await engine.open(messages, policy=policy) as stream:
            async for text in guarded(llm(REPLY), stream, substitute=" [removed]", max_ahead=1):
                print(repr(text))
            print(stream.verdict)

        def again(kept, hint):
            return llm(REPLY if hint is None else hint)

        def callback(verdict, kept):
            print(f"   [{verdict.risk}: kept {kept!r}]")
            return " In short: Paris."

        async with await engine.open(messages, policy=policy) as stream:
            async for text in intervene(again, stream, callback=callback, buffer_tokens=4, max_ahead=1):
                print(repr(text))
            print(stream.verdict)


asyncio.run(main(sys.argv[1]))
