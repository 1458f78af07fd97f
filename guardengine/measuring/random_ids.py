"""Random token ids that are equal on every machine, for measuring without text."""

from __future__ import annotations

import numpy as np

_CONTENT_IDS = 151643  # ids below the control tokens


def random_ids(num_streams: int, num_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random ids of content, [num_streams][num_tokens]; every stream is different."""
    rng = np.random.default_rng([seed, num_streams, num_tokens])
    ids: list[list[int]] = rng.integers(
        min(vocab_size, _CONTENT_IDS), size=(num_streams, num_tokens)
    ).tolist()
    return ids
