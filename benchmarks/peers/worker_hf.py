"""Worker: transformers with the guard heads, on the benchmark's own HFGuard.

Settings: one cache a stream, stepped in turn ("sdpa" or "eager"), as a service must do whose streams differ in length;
or all streams as rows of one cache ("batch"), which transformers can only do for streams of one length, as here.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from protocol import Chunks, serve

from guardengine.bench.hf import HFGuard, IncrementalStream

_PREFILL_TOKENS = 4096  # of all rows together in one call of the batch


class Transformers:
    """Streams in turn: one cache each."""

    def __init__(self, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        attention = "eager" if options["variant"] == "eager" else "sdpa"
        self._guard = HFGuard(
            options["model"], dtype=getattr(torch, options["dtype"]), attn_implementation=attention
        )
        self._streams: list[IncrementalStream] = []

    def describe(self) -> dict[str, Any]:
        return {
            **{name: metadata.version(name) for name in ("transformers", "torch")},
            "dtype": str(self._guard.dtype).removeprefix("torch."),
            "attention": self._guard.attn_implementation,
        }

    def check(self, sequences: Chunks) -> None:
        return None

    def prepare(self, prompts: Chunks) -> None:
        self._streams = [IncrementalStream(self._guard) for _ in prompts]
        for stream, prompt in zip(self._streams, prompts, strict=True):
            if prompt:
                stream.append(prompt, logits_to_keep=1)

    def advance(self, chunks: Chunks) -> list[int]:
        winners = []
        for stream, ids in zip(self._streams, chunks, strict=True):
            out = stream.append(ids, logits_to_keep=0 if stream.num_tokens else 1)
            winners.append(out.risk_level_logits[0].argmax(-1).tolist()[-1])
        return winners


class TransformersBatch(Transformers):
    """Streams together: rows of one cache."""

    def prepare(self, prompts: Chunks) -> None:
        self._cache: Any = None
        ids = torch.tensor(prompts, dtype=torch.long)
        for part in ids.split(max(1, _PREFILL_TOKENS // len(prompts)), dim=1) if ids.numel() else ():
            self._forward(part, logits_to_keep=1)

    def advance(self, chunks: Chunks) -> list[int]:
        logits = self._forward(torch.tensor(chunks), logits_to_keep=1 if self._cache is None else 0)
        winners: list[int] = logits.argmax(-1)[:, -1].tolist()
        return winners

    def _forward(self, ids: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        out = self._guard(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=logits_to_keep)
        self._cache = out.past_key_values
        return out.risk_level_logits


def load(options: dict[str, Any]) -> Transformers:
    return (TransformersBatch if options["variant"] == "batch" else Transformers)(options)


if __name__ == "__main__":
    serve(load)
