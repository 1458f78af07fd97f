"""The API key of an LLM's server, for those who ask it: the proxy, and chat."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from guardengine.errors import ConfigError

KEY_VARIABLE = "GUARDENGINE_UPSTREAM_KEY"


def read_upstream_key(
    file: str | Path | None = None, environment: Mapping[str, str] = os.environ
) -> str | None:
    """The one key in a file, else that in GUARDENGINE_UPSTREAM_KEY, else None. Raises ConfigError, without the key."""
    if file is None:
        return environment.get(KEY_VARIABLE, "").strip() or None
    try:
        words = Path(file).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read: {type(error).__name__}; it should have the upstream's key"
        ) from None
    if len(words) != 1 or not words[0].isascii():
        raise ConfigError(f"{file} has {len(words)} words; the upstream's API key alone is needed")
    return words[0]
