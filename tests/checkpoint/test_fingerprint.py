"""The digest of an engine's weights: reproducible with coreutils, and never that of other files than were loaded."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guardengine import CheckpointError, Engine

SMALL: dict[str, Any] = {"kv_cache_bytes": 2**20, "max_model_len": 64}


def test_the_digest_is_what_coreutils_say(tiny: Path, engine: Engine) -> None:
    lines = "".join(
        f"{hashlib.sha256((tiny / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("config.json", "model.safetensors")
    )
    assert engine.weights_digest() == hashlib.sha256(lines.encode()).hexdigest()


def test_files_that_changed_since_they_were_loaded_have_no_digest(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny, folder)
    weights = folder / "model.safetensors"
    with Engine.from_pretrained(folder, **SMALL) as engine:
        stream = engine.open(token_ids=[1, 2])
        replacement = tmp_path / "new"
        shutil.copy(weights, replacement)
        os.replace(replacement, weights)
        with pytest.raises(CheckpointError, match=r"model\.safetensors has changed"):
            stream.snapshot()
        weights.unlink()
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
            engine.weights_digest()


def test_every_shard_and_the_config_count(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    whole = checkpoints(vocab_size=512, dtype="float32")
    digests = set()
    for name in ("same", "config", "weights"):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        if name == "config":
            config = folder / "config.json"
            config.write_text(config.read_text().replace("Controversial", "Doubtful"))
        if name == "weights":
            with (folder / "model.safetensors").open("r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(bytes(4))
        with Engine.from_pretrained(folder, **SMALL) as engine:
            digests.add(engine.weights_digest())
    assert len(digests) == 3
