"""`guardengine annotate` against the engine's raw prefill rate, on conversations of 200 to 800 tokens.

    python benchmarks/bench_annotate.py [--checkpoint DIR] [--rows 2000] [--rounds 10]

2000 rows are a million tokens, twice. Where that takes too long, fewer rows give the same ratio with a wider spread:
at --rows 200 --rounds 5 a round has 40.

Each round annotates its share of the rows, then feeds random ids of as many tokens, in conversations of the same
lengths, through `engine.open(token_ids=...)` and `run()`, on the same engine; rounds alternate in which goes first.
Annotating is timed from the first row read to the last one in the journal: rendering, tokenizing, the labels of every
response token, one fsync a call. Loading, digests and the writing of OUT are not in it; their time is printed apart.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

from tqdm import tqdm

from guardengine import Engine
from guardengine.annotate.run import Options, Report, annotate
from guardengine.bench.checkpoints import cached_checkpoint
from guardengine.measuring.random_ids import random_ids
from guardengine.text.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
SHORTEST, LONGEST = 200, 800  # tokens of a conversation
TEMPLATE_TOKENS = 15


def conversations(count: int, tokenizer: Tokenizer, rng: random.Random) -> list[dict[str, str]]:
    """Prompts and responses of random words, a third to two thirds of the tokens in the response."""
    pages = (page.read_text() for page in (ROOT / "docs" / "design").glob("*.md"))
    words = sorted(set(re.findall(r"[a-z]{2,}", "".join(pages))))
    rows = []
    for _ in range(count):
        num_tokens = rng.randint(SHORTEST, LONGEST) - TEMPLATE_TOKENS
        num_response = int(num_tokens * rng.uniform(1 / 3, 2 / 3))
        texts = []
        for wanted in (num_tokens - num_response, num_response):
            ids = tokenizer.encode_text(" ".join(rng.choices(words, k=wanted)))
            texts.append(tokenizer.decode(ids[:wanted]))
        rows.append({"prompt": texts[0], "response": texts[1]})
    return rows


def prefill(engine: Engine, ids: list[list[int]]) -> float:
    """Seconds to run these streams, as many at a time as fit the KV cache."""
    room = engine.stats()["kv_blocks_total"] * engine.stats()["block_size"] * 0.9
    start = time.perf_counter()
    streams, num_tokens = [], 0
    for stream_ids in tqdm([*ids, None], desc="prefill", unit="stream", leave=False):
        if stream_ids is None or num_tokens + len(stream_ids) > room or len(streams) == 256:
            engine.run()
            for stream in streams:
                stream.close()
            streams, num_tokens = [], 0
        if stream_ids is not None:
            streams.append(engine.open(token_ids=stream_ids))
            num_tokens += len(stream_ids) + 16
    return time.perf_counter() - start


def annotated(
    engine: Engine, rows: list[dict[str, str]], checkpoint: Path, folder: Path
) -> tuple[Report, float]:
    """The report of annotating the rows, and the seconds that all of it took."""
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = time.perf_counter()
    report = annotate(
        source, out, checkpoint, Options(), restart=True, progress=True, load=lambda _: nullcontext(engine)
    )
    return report, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="default: random stream-0.6b weights, made once")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quantization")
    options = parser.parse_args()
    if not 1 <= options.rounds <= options.rows:
        parser.error("a round needs a row or more")
    checkpoint = options.checkpoint or cached_checkpoint("stream-0.6b")
    rng = random.Random(0)
    tokenizer = Tokenizer.from_dir(checkpoint)
    print("| round | tokens | annotate, tokens/s | prefill, tokens/s | ratio | not judging, s |")
    print("|---|---|---|---|---|---|")
    totals, ratios, all_rates = [0, 0.0, 0.0], [], []
    with (
        Engine.from_pretrained(
            checkpoint, num_threads=options.threads, quantization=options.quantization
        ) as engine,
        tempfile.TemporaryDirectory() as folder,
    ):
        prefill(engine, random_ids(1, 256, tokenizer.vocab_size, seed=0))
        for number in range(options.rounds):
            share = options.rows * (number + 1) // options.rounds - options.rows * number // options.rounds
            rows = conversations(share, tokenizer, rng)
            sizes = [
                len(tokenizer.encode_text(row["prompt"] + row["response"])) + TEMPLATE_TOKENS for row in rows
            ]
            ids = [random_ids(1, size, tokenizer.vocab_size, seed=rng.randrange(2**31))[0] for size in sizes]
            prefill_s = 0.0 if number % 2 == 0 else prefill(engine, ids)
            report, all_s = annotated(engine, rows, checkpoint, Path(folder))
            prefill_s = prefill_s or prefill(engine, ids)
            rates = report.num_tokens / report.seconds, sum(sizes) / prefill_s
            all_rates.append(rates)
            ratios.append(rates[0] / rates[1])
            print(
                f"| {number + 1} | {report.num_tokens} | {rates[0]:.0f} | {rates[1]:.0f} | {ratios[-1]:.3f} "
                f"| {all_s - report.seconds:.2f} |",
                flush=True,
            )
            totals = [
                total + new
                for total, new in zip(totals, (report.num_tokens, report.seconds, prefill_s), strict=True)
            ]
    num_tokens, annotate_s, prefill_s = totals
    print(
        f"\n{options.rows} rows, {num_tokens} tokens: annotate {num_tokens / annotate_s:.0f} tokens/s, prefill "
        f"{num_tokens / prefill_s:.0f}, ratio {prefill_s / annotate_s:.3f}\n"
        f"medians of {options.rounds} rounds: annotate {median(rate for rate, _ in all_rates):.0f}, prefill "
        f"{median(rate for _, rate in all_rates):.0f}, ratio {median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
