"""check_token_ids(): what a caller calls token ids, as a list of Python ints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from guardengine.errors import InvalidTokens

# An LLM appends few ids at a time. Up to so many Python is faster than numpy, whose calls take longer than the work.
_FEW = 16


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    """The ids as a list of Python ints. Raises InvalidTokens unless they are 1-D, not empty and in range."""
    is_short = type(token_ids) is list and 0 < len(token_ids) <= _FEW
    if is_short and all(type(token_id) is int and 0 <= token_id < vocab_size for token_id in token_ids):
        return list(token_ids)
    if isinstance(token_ids, str | bytes | bytearray | memoryview):
        raise InvalidTokens(f"token ids are needed, not text or bytes: {token_ids[:40]!r}")
    try:
        ids: np.ndarray[Any, Any] = np.asarray(token_ids)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidTokens(f"a flat sequence of token ids is needed: {error}") from None
    if ids.ndim != 1 or not ids.size:
        raise InvalidTokens(
            f"a flat, non-empty sequence of token ids is needed, not one of shape {list(ids.shape)}"
        )
    if ids.dtype.kind not in "iu":
        raise InvalidTokens(f"token ids must be whole numbers, not {ids[0]!r} ({ids.dtype})")
    if ids.min() < 0 or ids.max() >= vocab_size:
        index = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        raise InvalidTokens(
            f"token id {ids[index]} at index {index} is outside 0..{vocab_size - 1}; "
            "the ids must come from the Qwen3 tokenizer"
        )
    return ids.tolist()  # type: ignore[no-any-return]
