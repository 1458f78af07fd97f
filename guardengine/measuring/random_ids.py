"""Random token ids, the same on every machine: for measuring where there is nothing to read."""

from __future__ import annotations

import numpy as np

_CONTENT_IDS = 151643  # ids below the control tokens


def random_ids(num_streams: int, num_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Content ids for each stream, all different streams."""
    rng = np.random.default_rng([seed, num_streams, num_tokens])
    ids: list[list[int]] = rng.integers(
        min(vocab_size, _CONTENT_IDS), size=(num_streams, num_tokens)
    ).tolist()
    return ids
