"""Fixtures shared by the suite: tiny checkpoints, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from guardengine import Engine
from guardengine.make_checkpoint import make_checkpoint

torch.set_num_threads(1)  # tiny tensors: a second thread only costs

SMALL_VOCAB = 512


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoints(preset, **overrides) -> folder; each combination is written once a session."""
    made: dict[str, Path] = {}

    def get(preset: str = "stream-tiny", **overrides: Any) -> Path:
        key = repr((preset, sorted(overrides.items())))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / preset, preset, **overrides)
        return made[key]

    return get


@pytest.fixture(scope="session")
def tiny(checkpoints: Callable[..., Path]) -> Path:
    """A tiny Stream checkpoint in float32 with a small vocabulary and no use for text."""
    return checkpoints(vocab_size=SMALL_VOCAB, dtype="float32")


@pytest.fixture
def engine(tiny: Path) -> Any:
    with Engine.from_pretrained(tiny, kv_cache_bytes=2**22, max_model_len=512, block_size=4) as engine:
        yield engine
        engine.check_integrity()
