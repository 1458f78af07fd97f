"""Worker: llama.cpp through llama-cpp-python's low-level calls. All streams' new tokens go into one llama_decode."""

from __future__ import annotations

import ctypes
from importlib import metadata
from typing import Any

import llama_cpp
import numpy as np
from protocol import Chunks, serve

_BATCH = 2048  # tokens a llama_decode; it splits them into its own micro-batches of 512, the default
_PAD = 256  # cells of a sequence are padded to this by llama.cpp
_LOUD = 3  # GGML_LOG_LEVEL_WARN


class LlamaCpp:
    """A model and a context with room for the point's streams, each a sequence with KV cells of its own."""

    def __init__(self, options: dict[str, Any]) -> None:
        llama_cpp.llama_log_set(_print_warnings, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        loading.use_mmap = False  # pages of a mapped file could be read from disk while something is timed
        self._model = llama_cpp.llama_model_load_from_file(options["model"].encode(), loading)
        if not self._model:
            raise RuntimeError(
                f"llama.cpp cannot load {options['model']}; remove it to have it written again"
            )
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = options["num_streams"]
        params.n_ctx = -(-options["room"] // _PAD) * _PAD * options["num_streams"]
        params.n_batch = _BATCH
        params.n_threads = params.n_threads_batch = options["threads"]
        params.flash_attn_type = 1 if options["flash_attention"] else 0
        params.kv_unified = False  # its advice for sequences that share nothing
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise MemoryError(f"llama.cpp cannot make a context of {params.n_ctx} cells; use fewer streams")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._lengths = [0] * options["num_streams"]

    def describe(self) -> dict[str, Any]:
        return {
            "llama-cpp-python": metadata.version("llama-cpp-python"),
            "system_info": llama_cpp.llama_print_system_info().decode(),
            "kv_dtype": "float16",
        }

    def check(self, sequences: Chunks) -> list[int]:
        winners = []
        for sequence in sequences:
            self.prepare([[]])
            winners += self.advance([sequence])
        self.prepare([[]])
        return winners

    def prepare(self, prompts: Chunks) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)
        self._lengths = [0] * len(prompts)
        for stream, prompt in enumerate(prompts):
            for first in range(0, len(prompt), _BATCH):
                self._decode([(stream, token, False) for token in prompt[first : first + _BATCH]])
        llama_cpp.llama_synchronize(self._context)

    def advance(self, chunks: Chunks) -> list[int]:
        rows, ends, num_wanted = [], [], 0
        for stream, ids in enumerate(chunks):
            wants_all = self._lengths[stream] > 0
            rows += [(stream, token, wants_all or i == len(ids) - 1) for i, token in enumerate(ids)]
            num_wanted += len(ids) if wants_all else 1
            ends.append(num_wanted)
        if len(rows) > _BATCH:
            raise ValueError(f"{len(rows)} tokens in one step; at most {_BATCH} are handled")
        self._decode(rows)
        winners = self._logits(num_wanted).argmax(axis=1).tolist()
        return [winners[end - 1] for end in ends]

    def _decode(self, rows: list[tuple[int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (stream, token, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = self._lengths[stream]
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = stream
            batch.logits[i] = wanted
            self._lengths[stream] += 1
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(rows)} tokens")

    def _logits(self, num_rows: int) -> np.ndarray:
        """All rows that were asked for, in the batch's order: [num_rows, vocabulary]."""
        pointer = llama_cpp.llama_get_logits(self._context)  # waits for the computation
        return np.ctypeslib.as_array(pointer, shape=(num_rows, self._vocab_size))


@llama_cpp.llama_log_callback
def _print_warnings(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level >= _LOUD:
        print(text.decode(errors="replace"), end="", flush=True)


if __name__ == "__main__":
    serve(LlamaCpp)
