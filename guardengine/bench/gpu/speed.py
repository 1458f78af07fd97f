"""Step times on this machine's GPU, beside the prediction for it and beside other implementations."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from guardengine.bench.gpu import predict
from guardengine.bench.gpu.devices import GPU, GPUS
from guardengine.bench.hf import HFGuard, IncrementalStream
from guardengine.checkpoint.model_config import ModelConfig
from guardengine.engine.engine import Engine
from guardengine.errors import ConfigError
from guardengine.kernels import load
from guardengine.measuring.random_ids import random_ids
from guardengine.runners.kv_cache import CacheShape

_BLOCK_SIZE = 16
Point = tuple[int, int]  # streams, context


def copy_bytes_per_s() -> float:
    """The rate of the GPU's memory: bytes read and written in a second by a large copy."""
    source = torch.randint(0, 256, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds: float = load("triton").measure_graph(lambda: target.copy_(source))
    return 2 * source.nbytes / seconds


def engine_steps(
    folder: Path,
    config: ModelConfig,
    points: Sequence[Point],
    *,
    device: str,
    dtype: str,
    backend: str,
    steps: int,
    deadline: float,
    say: Callable[[str], object],
) -> list[dict[str, Any]]:
    """Time steps of one token for each stream, at each point. A point that does not fit, or for which there is no
    time, says so instead."""
    kv_dtype: torch.dtype = getattr(torch, dtype)
    rows: list[dict[str, Any]] = []
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else 2**32
    for streams, context in points:
        row: dict[str, Any] = {"streams": streams, "context": context}
        rows.append(row)
        blocks = streams * -(-(context + steps + 8) // _BLOCK_SIZE)
        needed = CacheShape(blocks, _BLOCK_SIZE, kv_dtype).num_bytes(config)
        if time.perf_counter() > deadline:
            row["left_out"] = "no time was left"
        elif needed > 0.7 * free:
            row["left_out"] = f"its KV cache takes {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
        else:
            say(f"{streams} streams with {context} tokens")
            with Engine.from_pretrained(
                folder, device=device, dtype=dtype, backend=backend, kv_cache_bytes=needed,
                max_num_streams=streams, block_size=_BLOCK_SIZE, kv_reserve=0.0,
            ) as engine:  # fmt: skip
                row |= _time_steps(engine, streams, context, steps, config.vocab_size)
            gc.collect()
            known = _known_gpu(device)
            if known is not None:
                row["predicted_ms"] = predict.predict(
                    known, config, dtype, dtype, (streams, 1, context), predict.Assumptions()
                ).step_ms
    return rows


def _time_steps(engine: Engine, streams: int, context: int, steps: int, vocab_size: int) -> dict[str, Any]:
    ids = random_ids(streams, context + steps + 8, vocab_size, 0)
    started = time.perf_counter()
    opened = [engine.open(token_ids=row[:context], role="user") for row in ids]
    engine.run()
    prompts_s = time.perf_counter() - started
    times = []
    for step in range(steps + 3):
        for stream, row in zip(opened, ids, strict=True):
            stream.append([row[context + step]])
        started = time.perf_counter()
        while engine.stats()["tokens_pending"]:
            engine.step()
        times.append(time.perf_counter() - started)
    times = sorted(times[3:])
    return {
        "step_ms": {
            "p10": 1e3 * times[len(times) // 10],
            "p50": 1e3 * statistics.median(times),
            "p90": 1e3 * times[-1 - len(times) // 10],
        },
        "tokens_per_s": streams / statistics.median(times),
        "prompt_tokens_per_s": streams * context / prompts_s,
    }


def transformers_steps(
    folder: Path,
    config: ModelConfig,
    points: Sequence[Point],
    *,
    device: str,
    dtype: str,
    steps: int,
    deadline: float,
) -> list[dict[str, Any]]:
    """Time the points on transformers: each stream has a cache of its own, and streams are stepped in turn."""
    guard = HFGuard(folder, dtype=getattr(torch, dtype), device=device)
    rows: list[dict[str, Any]] = []
    for streams, context in points:
        row: dict[str, Any] = {"streams": streams, "context": context}
        rows.append(row)
        if time.perf_counter() > deadline:
            row["left_out"] = "no time was left"
            continue
        ids = torch.tensor(random_ids(streams, context + steps + 3, config.vocab_size, 0))
        opened = [IncrementalStream(guard) for _ in range(streams)]
        for stream, tokens in zip(opened, ids, strict=True):
            stream.append(tokens[:context], logits_to_keep=1)
        times = []
        for step in range(steps + 3):
            started = time.perf_counter()
            for stream, tokens in zip(opened, ids, strict=True):
                out = stream.append(tokens[context + step : context + step + 1], logits_to_keep=1)
                out.risk_level_logits.cpu()  # the answer is there only once it has come back
            times.append(time.perf_counter() - started)
        row["step_ms"] = {"p50": 1e3 * statistics.median(times[3:])}
        row["tokens_per_s"] = streams / statistics.median(times[3:])
    return rows


def vllm_steps(folder: Path, vocab_size: int, points: Sequence[Point], steps: int) -> list[dict[str, Any]]:
    """Time vLLM, one token a step, on a causal model with the same backbone: it has a language model head instead of
    guard heads, and makes no labels."""
    from vllm import LLM, SamplingParams, TokensPrompt  # type: ignore[import-not-found]

    model = LLM(str(folder), skip_tokenizer_init=True, max_num_seqs=max(count for count, _ in points))

    def generate(prompts: list[list[int]], count: int) -> None:
        params = SamplingParams(max_tokens=count, ignore_eos=True, detokenize=False, temperature=0.0)
        model.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)

    return _generated(generate, vocab_size, points, steps)


def sglang_steps(folder: Path, vocab_size: int, points: Sequence[Point], steps: int) -> list[dict[str, Any]]:
    """Time SGLang under the same conditions as vLLM."""
    import sglang  # type: ignore[import-not-found]

    model = sglang.Engine(model_path=str(folder), skip_tokenizer_init=True)

    def generate(prompts: list[list[int]], count: int) -> None:
        model.generate(
            input_ids=prompts,
            sampling_params={"max_new_tokens": count, "ignore_eos": True, "temperature": 0.0},
        )

    try:
        return _generated(generate, vocab_size, points, steps)
    finally:
        model.shutdown()


def _generated(
    generate: Callable[[list[list[int]], int], None], vocab_size: int, points: Sequence[Point], steps: int
) -> list[dict[str, Any]]:
    """The time of a step: the time for `steps` more tokens divided by their number, for prompts that are in no
    cache."""
    rows = []
    for index, (streams, context) in enumerate(points):
        seconds = []
        for round_ in range(6):
            prompts = random_ids(streams, context, vocab_size, 1 + 6 * index + round_)
            count = 1 if round_ % 2 == 0 else 1 + steps
            started = time.perf_counter()
            generate(prompts, count)
            seconds.append(time.perf_counter() - started)
        # The first pair warms up.
        step_s = max(min(seconds[3::2]) - min(seconds[2::2]), 1e-9) / steps
        rows.append(
            {
                "streams": streams,
                "context": context,
                "step_ms": {"p50": 1e3 * step_s},
                "tokens_per_s": streams / step_s,
            }
        )
    return rows


def _known_gpu(device: str) -> GPU | None:
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device).lower()
    for key, gpu in GPUS.items():
        if key.removeprefix("rtx") in name.replace(" ", ""):
            return gpu
    return None


def points(streams: Sequence[int], contexts: Sequence[int]) -> list[Point]:
    """Every pair, small ones first. Raises ConfigError when there is none."""
    if not streams or not contexts:
        raise ConfigError("there is no point to measure")
    return sorted(((count, context) for count in streams for context in contexts), key=lambda p: p[0] * p[1])
