"""A Gen checkpoint's answers: chosen from the grammar, greedy, and transformers' batched generate, taking turns.

    python benchmarks/bench_gen.py                       # 16 conversations, gen-0.6b
    python benchmarks/bench_gen.py --batch 8 --rounds 3 --json gen.json

Random layers with a head that was fitted to answer by the grammar (guardengine.bench.answering_weights), so that
answers are as long and end as a trained model's do. transformers pads on the left, has its own KV cache and runs in the
faster of float32 and bfloat16. Ours is loaded anew for each measurement: no conversation is in its prefix cache. "warm"
has answered another conversation before, as a service has, so that the instructions are there.
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
from guardengine.bench.answering_weights import conversations, make_answering_checkpoint
from guardengine.bench.checkpoints import cache_folder
from guardengine.gen.answers import MAX_NEW_TOKENS
from guardengine.measuring.files import markdown_table
from guardengine.measuring.machine import machine_stamp

WARM_UP = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


class Transformers:
    """Batched greedy generate, as a user of the released checkpoint writes it."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")

    def answer(self, talks: list[Any], num_tokens: int = MAX_NEW_TOKENS) -> list[str]:
        texts = [self.tokenizer.apply_chat_template(messages, tokenize=False) for messages in talks]
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        out = self.model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
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
    parser.add_argument("--quantization", choices=("int8", "w8a8"), help="of ours (default: none)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    folder = cache_folder() / f"{arguments.preset}-answering"
    if not (folder / "config.json").exists():
        make_answering_checkpoint(folder, arguments.preset, num_learned=60)
    talks = conversations(arguments.batch, seed=7)
    hf = min(
        (Transformers(folder, dtype) for dtype in (torch.float32, torch.bfloat16)),
        key=lambda model: timed(lambda: model.answer(talks[:2], 2)),
    )
    names = ("choice", "choice, warm", "greedy", "greedy, warm", "transformers")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    steps: dict[str, int] = {}
    for _ in range(arguments.rounds):
        seconds["transformers"].append(timed(lambda: hf.answer(talks)))
        for name in names[:-1]:
            with Engine.from_pretrained(folder, quantization=arguments.quantization) as engine:
                if "warm" in name:
                    engine.moderate_many([WARM_UP[:1], WARM_UP])
                before = engine.stats()["steps"]
                mode = name.partition(",")[0]
                seconds[name].append(timed(lambda: engine.moderate_many(talks, mode=mode)))  # noqa: B023
                steps[name] = engine.stats()["steps"] - before
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        [name, f"{len(talks) / medians[name]:.2f}", f"{medians['transformers'] / medians[name]:.2f}"]
        for name in names
    ]
    print(markdown_table(["answers", "conversations/s", "against transformers"], rows))
    ratio = medians["greedy"] / medians["choice"]
    print(f"choice against greedy: {ratio:.2f}; steps: {steps}; transformers in {hf.model.dtype}")
    if arguments.json is not None:
        record = {
            "machine": machine_stamp(),
            "batch": len(talks),
            "quantization": arguments.quantization,
            "transformers_dtype": str(hf.model.dtype),
            "seconds": seconds,
            "steps": steps,
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
