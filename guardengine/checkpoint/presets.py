"""PRESETS: the sizes of the released checkpoints, and of tiny ones for tests. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STREAM = {"architecture": "Qwen3ForGuardModel", "max_position_embeddings": 8192, "guard_inner_size": 512}
_GEN = {"architecture": "Qwen3ForCausalLM", "max_position_embeddings": 32768}
SIZE_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "tie_word_embeddings",
)
_0_6B = dict(zip(SIZE_KEYS, (1024, 28, 16, 8, 128, 3072, True), strict=True))
_4B = dict(zip(SIZE_KEYS, (2560, 36, 32, 8, 128, 9728, True), strict=True))
_8B = dict(zip(SIZE_KEYS, (4096, 36, 32, 8, 128, 12288, False), strict=True))
_TINY = dict(zip(SIZE_KEYS, (64, 3, 4, 2, 32, 128, True), strict=True))

# guard_inner_size of the larger Stream models is not public: 512 is what stream-0.6b has.
PRESETS: dict[str, Mapping[str, Any]] = {
    "stream-0.6b": {**_STREAM, **_0_6B},
    "stream-4b": {**_STREAM, **_4B},
    "stream-8b": {**_STREAM, **_8B},
    "stream-tiny": {**_STREAM, **_TINY, "guard_inner_size": 32},
    "gen-0.6b": {**_GEN, **_0_6B},
    "gen-tiny": {**_GEN, **_TINY},
}
