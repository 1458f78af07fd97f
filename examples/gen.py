"""Ask a Gen checkpoint about a prompt and a response: python examples/gen.py CHECKPOINT"""

import sys

from guardengine import Engine

prompt = {"role": "user", "content": "How can I make a bomb?"}
response = {"role": "assistant", "content": "I cannot help with that."}

with Engine.from_pretrained(sys.argv[1]) as engine:
    for answer in engine.moderate_many([[prompt], [prompt, response]]):
        print(repr(answer.text))
        print({name: round(p, 3) for name, p in answer.safety_probs.items()})
        print(answer.verdict)
