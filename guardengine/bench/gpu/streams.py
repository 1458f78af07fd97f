"""Whole streams on the triton backend: against the reference backend on the same device, and against themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from guardengine.checkpoint.files import open_checkpoint
from guardengine.engine.engine import Engine
from guardengine.labels import Label
from guardengine.measuring.random_ids import random_ids

Logits = npt.NDArray[np.float32]

_FP32_LIMIT = 1e-3  # of logits, as the benchmark's own check allows


def check_streams(
    folder: Path, device: str, dtype: str, *, kv_dtype: str = "auto", is_tiny: bool
) -> dict[str, Any]:
    """Compare the labels of a stream that is fed in pieces, and of many streams that are forked, rolled back and
    closed, with those of the reference backend. Differences are under "problems".

    float32: no logit may differ by more than 1e-3 from that of the reference backend. bfloat16 and int8 caches: the
    mean distance from float32 may be at most twice that of the reference backend in the same dtypes.

    Compared with itself, the backend must give the same bits alone, in company and in other chunks, wherever steps
    have up to 64 rows. In Triton's interpreter this is only recorded: there, products are numpy's, whose bits depend
    on the place of a row in a tile.
    """
    length, company = (8, 1) if is_tiny else (96, 15)
    options: dict[str, Any] = {"kv_cache_bytes": 2**22 if is_tiny else 2**30, "max_num_streams": company + 2}
    if is_tiny:
        options |= {"max_model_len": 64, "block_size": 4}
    problems: list[str] = []

    def reference(dtype: str, kv_dtype: str) -> tuple[Logits, Logits]:
        with Engine.from_pretrained(
            folder, device=device, backend="reference", dtype=dtype, kv_dtype=kv_dtype, **options
        ) as engine:
            return _fed(engine, ids[0], [length]), _crowd(engine, ids)

    with open_checkpoint(folder) as checkpoint:
        ids = random_ids(company + 1, length, checkpoint.config.vocab_size, 0)
    exact = reference("float32", "auto")
    with Engine.from_pretrained(
        folder, device=device, backend="triton", dtype=dtype, kv_dtype=kv_dtype, **options
    ) as engine:
        pieces = [length // 2, 1, 1, length - length // 2 - 2]
        found = _fed(engine, ids[0], pieces)
        in_company = _in_company(engine, ids, pieces)
        prompt = min(60, length)
        other = _fed(engine, ids[0], [*[prompt], *([length - prompt] if length > prompt else [])])
        crowd = _crowd(engine, ids)
        engine.check_integrity()
    plain = exact if dtype == "float32" and kv_dtype == "auto" else reference(dtype, kv_dtype)
    errors = [np.abs(ours - theirs) for ours, theirs in zip((found, crowd), exact, strict=True)]
    for name, error, own, theirs in zip(("a stream", "a crowd"), errors, plain, exact, strict=True):
        if not np.isfinite(error).all():
            problems.append(f"{name}: some logits are not finite")
        elif plain is exact:
            if error.max() > _FP32_LIMIT:
                problems.append(f"{name}: a logit is off by {error.max():.1e}, allowed {_FP32_LIMIT:.0e}")
        elif error.mean() > 2 * np.abs(own - theirs).mean() + 1e-4:
            problems.append(
                f"{name}: off by {error.mean():.1e} on average, the reference by {np.abs(own - theirs).mean():.1e}"
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
        "labels": sum(map(len, errors)),
        "mean_error": float(np.concatenate(errors).mean()),
        "largest_error": float(np.concatenate(errors).max()),
        "problems": problems,
    }


def _fed(engine: Engine, ids: Sequence[int], pieces: Sequence[int]) -> Logits:
    """All risk and category logits of a stream whose tokens are appended piece by piece and all labelled."""
    stream = engine.open(token_ids=ids[: pieces[0]], role="assistant")
    labels = engine.run()
    start = pieces[0]
    for piece in pieces[1:]:
        stream.append(ids[start : start + piece])
        labels += engine.run()
        start += piece
    stream.close()
    return _stacked(labels)


def _crowd(engine: Engine, ids: Sequence[Sequence[int]]) -> Logits:
    """All logits of streams of many lengths that are forked, rolled back and closed, in order of stream and position:
    large steps with prompts of many rows beside single ones, then small steps."""
    half = len(ids[0]) // 2
    lengths = [len(ids[0]) - 4, *(1 + half * index // len(ids) for index in range(1, len(ids)))]
    streams = [
        engine.open(token_ids=row[:length], role="assistant", stream_id=f"{index:03}")
        for index, (row, length) in enumerate(zip(ids, lengths, strict=True))
    ]
    labels = engine.run()
    branch = streams[0].fork(stream_id="branch")
    for stream, row in zip([*streams, branch], [*ids, ids[-1]], strict=True):
        stream.append(row[half : half + 2])
    labels += engine.run()
    streams[0].rollback(half)
    streams.pop().close()
    for stream in (*streams, branch):
        stream.append(ids[-1][half + 2 : half + 3])
        labels += engine.run()
    for stream in (*streams, branch):
        stream.close()
    return _stacked(sorted(labels, key=lambda label: (label.stream_id, label.position)))


def _in_company(engine: Engine, ids: Sequence[Sequence[int]], pieces: Sequence[int]) -> Logits:
    """The logits of the first stream, while other streams have tokens in the same steps: one each, so that steps stay
    small."""
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
    return _stacked(labels)


def _stacked(labels: Sequence[Label]) -> Logits:
    return np.stack([np.concatenate([label.risk_logits, label.category_logits]) for label in labels])
