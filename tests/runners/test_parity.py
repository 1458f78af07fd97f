"""All four heads at every position against transformers' Qwen3Model plus the heads, from the same files.

GUARDENGINE_CHECKPOINT=folder runs the same comparison on a real checkpoint, and against the released remote code
where that still loads.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from native_ops import HOST_BACKENDS

from guardengine import AutoGuard
from guardengine.bench.hf import HFGuard

SHAPES = {
    "gqa2-d64-tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "gqa4-d128-untied": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "mha-d32-v5": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "config_names": "v5"},
}
VOCAB = 600
LOGITS = ("risk_level_logits", "category_logits", "query_risk_level_logits", "query_category_logits")
REAL = os.environ.get("GUARDENGINE_CHECKPOINT")


def conversations(count: int, longest: int = 2000, vocab_size: int = VOCAB) -> list[torch.Tensor]:
    """Random ids, [1, n] with n log-uniform from 10 to `longest`, both ends present."""
    rng = random.Random(7)
    lengths = [10, longest] + [int(10 * (longest / 10) ** rng.random()) for _ in range(count - 2)]
    return [torch.tensor([[rng.randrange(vocab_size) for _ in range(n)]]) for n in lengths]


def parts(output: object) -> list[torch.Tensor]:
    return [getattr(output, name).float() for name in LOGITS]


def largest_difference(a: object, b: object) -> float:
    return max((x - y).abs().max().item() for x, y in zip(parts(a), parts(b), strict=True))


@pytest.fixture(scope="module", params=SHAPES)
def shaped(request: pytest.FixtureRequest, checkpoints) -> Path:
    return checkpoints(vocab_size=VOCAB, dtype="float32", num_hidden_layers=3, **SHAPES[request.param])


@pytest.mark.slow
@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_fp32_matches_transformers_at_every_position(shaped: Path, backend: str) -> None:
    hf = HFGuard(shaped, dtype=torch.float32)
    # A small token budget: long conversations run in chunks.
    ours = AutoGuard.from_pretrained(shaped, backend=backend, max_num_batched_tokens=700)
    for ids in conversations(20):
        expected, actual = hf.forward(ids), ours(ids)
        assert largest_difference(expected, actual) <= 1e-4
        for a, b in zip(parts(actual), parts(expected), strict=True):
            assert torch.equal(a.argmax(-1), b.argmax(-1))


@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_bf16_error_is_at_most_twice_transformers(shaped: Path, backend: str) -> None:
    exact_model = HFGuard(shaped, dtype=torch.float32)
    hf = HFGuard(shaped, dtype=torch.bfloat16)
    ours = AutoGuard.from_pretrained(shaped, backend=backend, dtype="bfloat16")
    for ids in conversations(6, longest=600):
        exact = exact_model.forward(ids)
        for e, h, o in zip(parts(exact), parts(hf.forward(ids)), parts(ours(ids)), strict=True):
            # Compared over a whole sequence: single positions of two noisy computations are not ordered.
            assert (o - e).abs().mean() <= 2 * (h - e).abs().mean()
            assert (o - e).abs().max() <= 2 * (h - e).abs().max()


def test_ragged_batch_matches_right_padded_transformers_batch(shaped: Path) -> None:
    hf, ours = HFGuard(shaped, dtype=torch.float32), AutoGuard.from_pretrained(shaped)
    rows = [ids[0] for ids in conversations(6, longest=90)]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
    mask = torch.stack([(torch.arange(longest) < len(row)).long() for row in rows])
    expected, actual = hf.forward(ids, attention_mask=mask), ours(ids, attention_mask=mask)
    for e, a in zip(parts(expected), parts(actual), strict=True):
        assert ((e - a).abs() * mask[..., None]).max() <= 1e-4
        assert not (a * (1 - mask[..., None])).any()


@pytest.mark.skipif(not REAL, reason="needs real weights: GUARDENGINE_CHECKPOINT names none")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_real_checkpoint(dtype: str, backend: str) -> None:
    exact = HFGuard(Path(str(REAL)), dtype=torch.float32)
    plain = HFGuard(Path(str(REAL)), dtype=getattr(torch, dtype))
    ours = AutoGuard.from_pretrained(str(REAL), backend=backend, dtype=dtype)
    for ids in conversations(4, longest=500, vocab_size=151_643):
        expected, actual = exact.forward(ids), ours(ids)
        allowed = 1e-4 if dtype == "float32" else 2 * largest_difference(plain.forward(ids), expected)
        assert largest_difference(actual, expected) <= allowed


@pytest.mark.skipif(not REAL, reason="needs real weights: GUARDENGINE_CHECKPOINT names none")
def test_real_checkpoint_against_its_remote_code() -> None:
    """The released code needs transformers 4; where it does not load, the comparison is skipped and says why."""
    from transformers import AutoModel

    try:
        released = AutoModel.from_pretrained(str(REAL), dtype=torch.float32, trust_remote_code=True).eval()
    except Exception as error:  # whatever the remote code fails with
        pytest.skip(f"needs real weights whose code loads: {error}")
    ours = AutoGuard.from_pretrained(str(REAL), dtype="float32")
    for ids in conversations(4, longest=500, vocab_size=151_643):
        with torch.inference_mode():
            expected = released(ids)
        assert largest_difference(ours(ids), expected) <= 1e-4
