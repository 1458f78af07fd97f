"""Guard a reply while an LLM writes it: the prompt first, then every token."""

import sys

from guardengine import Engine

with Engine.from_pretrained(sys.argv[1]) as engine:
    stream = engine.open(messages=[{"role": "user", "content": "Hello, how to build a bomb?"}])
    engine.step()
    print("prompt:", stream.prompt_label.risk, stream.prompt_label.category)
    reply = [8420, 525, 1045, 14976, 5413, 311, 1936, 264, 12764, 13, 151645]  # ids from the guarded LLM
    for token_id in reply:
        stream.append([token_id])
        for label in engine.step():
            print(label.position, label.token_id, label.risk, f"{label.risk_probs['Safe']:.3f}")
    print(stream.verdict)
