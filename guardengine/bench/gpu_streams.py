"""Whole streams on the triton backend: against the reference backend on the same device, and against themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from guardengine.bench.workload import random_ids
from guardengine.engine import Engine

_FP32_LIMIT = 1e-3  # of logits, as the benchmark's own check allows


def check_streams(folder: Path, device: str, dtype: str, *, is_tiny: bool) -> dict[str, Any]:
    """Compare label for label; what differs is under "problems".

    float32: no logit further than 1e-3 from the reference backend's. bfloat16: on average at most twice as far from
    float32 as the reference backend in bfloat16. On itself: the same bits alone, in company, and in other chunks,
    wherever steps have up to 64 rows. That is recorded only of Triton's interpreter: numpy's products, unlike a
    GPU's, depend on where in a tile a row stands.
    """
    length, company = (8, 1) if is_tiny else (96, 15)
    options: dict[str, Any] = {"kv_cache_bytes": 2**22 if is_tiny else 2**30, "max_num_streams": company + 1}
    if is_tiny:
        options |= {"max_model_len": 64, "block_size": 4}
    problems: list[str] = []
    with Engine.from_pretrained(
        folder, device=device, backend="reference", dtype="float32", **options
    ) as engine:
        ids = random_ids(company + 1, length, engine.core.runner.config.vocab_size, 0)
        exact = _fed(engine, ids[0], [length])
    with Engine.from_pretrained(folder, device=device, backend="triton", dtype=dtype, **options) as engine:
        pieces = [length // 2, 1, 1, length - length // 2 - 2]
        found = _fed(engine, ids[0], pieces)
        in_company = _in_company(engine, ids, pieces)
        prompt = min(60, length)
        other = _fed(engine, ids[0], [*[prompt], *([length - prompt] if length > prompt else [])])
        engine.check_integrity()
    error = np.abs(found - exact)
    if not np.isfinite(found).all():
        problems.append("some logits are not finite")
    if dtype == "float32":
        if error.max() > _FP32_LIMIT:
            problems.append(f"a logit is off by {error.max():.1e}, allowed {_FP32_LIMIT:.0e}")
    else:
        with Engine.from_pretrained(
            folder, device=device, backend="reference", dtype=dtype, **options
        ) as engine:
            plain = np.abs(_fed(engine, ids[0], [length]) - exact)
        if error.mean() > 2 * plain.mean() + 1e-4:
            problems.append(
                f"off by {error.mean():.1e} on average, the reference in {dtype} by {plain.mean():.1e}"
            )
    changed = {
        name: float(np.abs(found - again).max())
        for name, again in (("in company", in_company), ("in other chunks", other))
        if not np.array_equal(found, again)
    }
    if device != "cpu":
        problems += [f"other bits {name}: {difference:.1e}" for name, difference in changed.items()]
    return {
        "changed_bits": changed,
        "labels": len(found),
        "mean_error": float(error.mean()),
        "largest_error": float(error.max()),
        "problems": problems,
    }


def _fed(engine: Engine, ids: Sequence[int], pieces: Sequence[int]) -> npt.NDArray[np.float32]:
    """All of a stream's risk and category logits, its tokens appended piece by piece, each labelled."""
    stream = engine.open(token_ids=ids[: pieces[0]], role="assistant")
    labels = engine.run()
    start = pieces[0]
    for piece in pieces[1:]:
        stream.append(ids[start : start + piece])
        labels += engine.run()
        start += piece
    stream.close()
    return np.stack([np.concatenate([label.risk_logits, label.category_logits]) for label in labels])


def _in_company(
    engine: Engine, ids: Sequence[Sequence[int]], pieces: Sequence[int]
) -> npt.NDArray[np.float32]:
    """The first stream's logits, the others' tokens in the same steps: one each, so that steps stay small."""
    others = [engine.open(token_ids=row[:1], role="assistant") for row in ids[1:]]
    engine.run()
    stream = engine.open(token_ids=ids[0][: pieces[0]], role="assistant")
    labels = []
    start = pieces[0]
    for index in range(len(pieces)):
        for other, row in zip(others, ids[1:], strict=True):
            other.append([row[1 + index]])
        if index:
            stream.append(ids[0][start : start + pieces[index]])
            start += pieces[index]
        labels += [label for label in engine.run() if label.stream_id == stream.stream_id]
    for one in (*others, stream):
        one.close()
    return np.stack([np.concatenate([label.risk_logits, label.category_logits]) for label in labels])
