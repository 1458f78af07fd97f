"""Worker: guardengine itself, with the dtype and quantization it is told."""

from __future__ import annotations

from typing import Any

from protocol import Chunks, serve

from guardengine.engine.engine import Engine
from guardengine.engine.stream import Stream


class GuardEngine:
    """Streams of one Engine, stepped together."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._engine = Engine.from_pretrained(
            options["model"],
            dtype=options["dtype"],
            quantization=options["quantization"],
            num_threads=options["threads"],
            max_num_streams=options["num_streams"],
            kv_cache_bytes=options["kv_cache_bytes"],
        )
        self._streams: list[Stream] = []
        self._prompts: Chunks = []
        self._num_fed = 0  # tokens that every stream got after its prompt

    def describe(self) -> dict[str, Any]:
        stats = self._engine.stats()
        names = ("version", "dtype", "kv_dtype", "backend", "quantization", "isa", "num_threads")
        return {name: stats[name] for name in names if name in stats}

    def check(self, sequences: Chunks) -> None:
        return None

    def prepare(self, prompts: Chunks) -> None:
        if self._streams and prompts == self._prompts and all(prompts):
            # The same contexts again, for the next peer: taken back to, not computed anew.
            for stream in self._streams if self._num_fed else ():
                stream.rollback(self._num_fed)
        else:
            for stream in self._streams:
                stream.close()
            self._streams = [self._engine.open(token_ids=prompt, role="user") for prompt in prompts if prompt]
            self._engine.run()
            self._prompts = prompts
        self._num_fed = 0

    def advance(self, chunks: Chunks) -> list[int]:
        if self._streams:
            for stream, ids in zip(self._streams, chunks, strict=True):
                stream.append(ids)
            wanted = sum(map(len, chunks))
        else:
            self._streams = [self._engine.open(token_ids=ids, role="user") for ids in chunks]
            wanted = len(chunks)
        labels = self._engine.run()
        if len(labels) != wanted:
            raise RuntimeError(f"{len(labels)} labels came, {wanted} were to come")
        self._num_fed += len(chunks[0])
        last = {label.stream_id: int(label.risk_logits.argmax()) for label in labels}
        return [last[stream.stream_id] for stream in self._streams]


if __name__ == "__main__":
    serve(GuardEngine)
