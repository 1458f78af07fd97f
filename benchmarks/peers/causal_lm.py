"""The language model that peers run: a Stream checkpoint's backbone with 1,024 tokens of vocabulary.

Peers have no guard heads. A head over 1,024 tokens, tied to the first 1,024 embeddings, has as many weights as the
guard heads of stream-0.6b, and the layers are the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from guardengine.checkpoint.files import open_checkpoint
from guardengine.checkpoint.weights import tensor_shapes
from guardengine.errors import ConfigError
from guardengine.measuring.random_ids import random_ids

VOCAB_SIZE = 1024
EMBEDDING = "model.embed_tokens.weight"
_CHECK_SEQUENCES, _CHECK_TOKENS = 8, 32


def backbone_names(names: tuple[str, ...]) -> list[str]:
    """Of a Stream checkpoint's tensors, those of the decoder; the guard heads stay behind."""
    return [name for name in names if name.startswith("model.")]


def write_causal_lm(source: Path, target: Path) -> Path:
    """Write `target` as a Qwen3ForCausalLM checkpoint from the Stream checkpoint `source`, unless it is there."""
    if (target / "config.json").is_file():
        return target
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    with open_checkpoint(source) as checkpoint:
        if checkpoint.config.vocab_size < VOCAB_SIZE:
            raise ConfigError(
                f"{source}: a vocabulary of {checkpoint.config.vocab_size} is too small; {VOCAB_SIZE} are needed"
            )
        shapes = tensor_shapes(checkpoint.config)
        tensors = {
            name: checkpoint.tensor(name, shapes[name]) for name in backbone_names(checkpoint.tensor_names)
        }
        tensors[EMBEDDING] = tensors[EMBEDDING][:VOCAB_SIZE]
        part = _fresh(target)
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    kept = {key: value for key, value in config.items() if not _is_of_heads(key)}
    kept |= {"architectures": ["Qwen3ForCausalLM"], "vocab_size": VOCAB_SIZE, "tie_word_embeddings": True}
    # No token ends a reply: a peer that generates must not stop. Ids past the vocabulary would be refused.
    kept |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    (part / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    part.rename(target)
    return target


def check_sequences() -> list[list[int]]:
    """Ids after which every peer must find the same next tokens."""
    return random_ids(_CHECK_SEQUENCES, _CHECK_TOKENS, VOCAB_SIZE, seed=1)


def expected_winners(folder: Path) -> list[int]:
    """transformers' next tokens after `check_sequences` in float32; computed once and kept beside the weights."""
    kept = folder / "expected_winners.json"
    if kept.is_file():
        winners: list[int] = json.loads(kept.read_text(encoding="utf-8"))
        return winners
    from transformers import Qwen3ForCausalLM  # takes seconds to import

    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.from_numpy(np.array(check_sequences())), logits_to_keep=1).logits
    winners = logits[:, -1].argmax(-1).tolist()
    kept.write_text(json.dumps(winners), encoding="utf-8")
    return winners


def _is_of_heads(key: str) -> bool:
    names = ("auto_map", "guard_inner_size", "num_risk_level", "num_category", "num_query_")
    return key.startswith(names) or key.endswith("_map")


def _fresh(target: Path) -> Path:
    """An empty folder beside `target`, to be renamed to it when it is complete."""
    part = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part
