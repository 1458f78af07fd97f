"""The checkpoint of a benchmark: a folder that the user names, or random weights in a cache folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from guardengine.checkpoint.presets import PRESETS
from guardengine.checkpoint.random_weights import make_checkpoint
from guardengine.errors import ConfigError

STREAM_PRESETS = tuple(name for name in PRESETS if name.startswith("stream-"))


def cache_folder() -> Path:
    """$GUARDENGINE_CACHE, or ~/.cache/guardengine."""
    chosen = os.environ.get("GUARDENGINE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "guardengine"


def cached_checkpoint(preset: str, *, seed: int = 0, progress: bool = True, **overrides: Any) -> Path:
    """The folder with a preset's random weights, which are made on first use. Raises ConfigError."""
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}: choose one of {', '.join(PRESETS)}")
    parts = [preset, f"seed{seed}", *(f"{key}={value}" for key, value in sorted(overrides.items()))]
    folder = cache_folder() / "-".join(parts)
    if not (folder / "config.json").is_file():
        try:
            make_checkpoint(folder, preset, seed=seed, progress=progress, **overrides)
        except ConfigError:
            # Another process may have just written the same weights.
            if not (folder / "config.json").is_file():
                raise
    return folder
