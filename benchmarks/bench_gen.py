"""A Gen checkpoint's answers: chosen from the grammar, greedy, and transformers' batched generate, taking turns.

    python benchmarks/bench_gen.py                       # 16 conversations, gen-0.6b, random weights
    python benchmarks/bench_gen.py --batch 8 --rounds 3 --json gen.json

Random weights never end an answer, so greedy decoding is held to --answer-tokens, the length of

    Safety: Safe / Categories: None / Refusal: No

with its end, in both engines: the shortest answer, in their favour. A chosen answer is whatever the random weights
prefer; most are longer and take more steps than a trained model's, which is right at the first guess more often than
not. transformers pads on the left and keeps its own KV cache; it runs in the faster of float32 and bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from guardengine import Engine
from guardengine.bench.checkpoints import cached_checkpoint
from guardengine.bench.report import markdown_table
from guardengine.gen import answers
from guardengine.machine import machine_stamp
from guardengine.verify_corpus import read_built_in

WARM_UP = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


class Transformers:
    """Batched greedy generate, as a user of the released checkpoint writes it."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")

    def answer(self, talks: list[Any], num_tokens: int) -> list[str]:
        texts = [self.tokenizer.apply_chat_template(messages, tokenize=False) for messages in talks]
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
        out = self.model.generate(**inputs, **lengths, do_sample=False)
        return self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def timed(run: Any) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="gen-0.6b")
    parser.add_argument("--batch", type=int, default=16, help="conversations (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer-tokens", type=int, default=13)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    folder = cached_checkpoint(arguments.preset)
    talks = [messages for _, messages in read_built_in() if messages[-1]["role"] in ("user", "assistant")]
    talks = [talks[index % len(talks)] for index in range(arguments.batch)]
    answers.MAX_NEW_TOKENS = arguments.answer_tokens
    hf = min(
        (Transformers(folder, dtype) for dtype in (torch.float32, torch.bfloat16)),
        key=lambda model: timed(lambda: model.answer(talks[:2], 2)),
    )
    names = ("choice, first call", "choice", "greedy", "transformers")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    steps = []
    for _ in range(arguments.rounds):
        seconds["transformers"].append(timed(lambda: hf.answer(talks, arguments.answer_tokens)))
        with Engine.from_pretrained(
            folder
        ) as engine:  # anew: nothing of the last round is in its prefix cache
            seconds["choice, first call"].append(timed(lambda: engine.moderate_many(talks)))
            steps.append(engine.stats()["steps"])
        for mode in ("choice", "greedy"):
            with Engine.from_pretrained(folder) as engine:
                # The instructions are there, the conversations are not: as in a service.
                engine.moderate_many([WARM_UP[:1], WARM_UP])
                seconds[mode].append(timed(lambda: engine.moderate_many(talks, mode=mode)))  # noqa: B023
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        [name, f"{len(talks) / medians[name]:.2f}", f"{medians['transformers'] / medians[name]:.2f}"]
        for name in names
    ]
    print(markdown_table(["answers", "conversations/s", "against transformers"], rows))
    ratio = medians["greedy"] / medians["choice"]
    print(f"choice against greedy: {ratio:.2f}; steps: {steps}; transformers in {hf.model.dtype}")
    if arguments.json is not None:
        record = {"machine": machine_stamp(), "batch": len(talks), "seconds": seconds, "steps": steps}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
