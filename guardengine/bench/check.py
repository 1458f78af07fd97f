"""Correctness before speed: compare the engine's labels with transformers on one small conversation."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from guardengine.bench.hf import GuardOutput, HFGuard
from guardengine.engine.engine import Engine
from guardengine.errors import LabelsDiffer
from guardengine.extras import how_to_install
from guardengine.measuring.random_ids import random_ids
from guardengine.runners.cores import memory_bytes

_PROMPT_LEN, _RESPONSE_LEN = 12, 20
# Two correct float32 computations of a logit differ by much less, a wrong one by much more.
_FP32_LIMIT = 1e-3


def check_labels(
    engine: Engine,
    folder: Path,
    *,
    vocab_size: int,
    dtype: str,
    is_quantized: bool,
    seed: int,
    num_weights: int,
) -> dict[str, Any]:
    """Compare all logits of one conversation, which the engine is fed in several pieces.

    With float32 no logit may differ from that of transformers by more than 1e-3. With bfloat16 the mean error against
    float32 may be at most twice the mean error of transformers in bfloat16, and the largest at most three times its
    largest. With int8 the mean may be eight times that (a wrong computation is far above; `guardengine
    verify-quantization` measures the cost of rounding).

    Returns:
        The errors and limits; or "skipped" with the reason where transformers is not installed or float32 weights do
            not fit.

    Raises:
        LabelsDiffer: An error is above its limit.
    """
    if importlib.util.find_spec("transformers") is None:
        return {"skipped": f"transformers is not installed; {how_to_install('bench')}"}
    needed = 5 * num_weights  # 4 bytes for each weight, and room for one tensor as it is stored
    free = memory_bytes("MemAvailable")
    if needed > free:
        return {
            "skipped": f"transformers in float32 needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        }
    ids = random_ids(1, _PROMPT_LEN + _RESPONSE_LEN, vocab_size, seed)[0]
    ours = _engine_logits(engine, ids)
    tokens = torch.tensor([ids])
    exact = _hf_logits(HFGuard(folder, dtype=torch.float32).forward(tokens))
    error = np.abs(ours - exact)
    report = {
        "num_logits": int(ours.size),
        "mean_error": float(error.mean()),
        "largest_error": float(error.max()),
    }
    if dtype == "float32":
        report |= {"mean_limit": _FP32_LIMIT, "largest_limit": _FP32_LIMIT}
    else:
        plain = np.abs(_hf_logits(HFGuard(folder, dtype=torch.bfloat16).forward(tokens)) - exact)
        report |= {"mean_limit": 2 * float(plain.mean()), "largest_limit": 3 * float(plain.max())}
    if is_quantized:
        plain_mean = report["mean_limit"] / 2 if dtype != "float32" else float(np.abs(exact).mean()) / 64
        report |= {"mean_limit": 8 * plain_mean, "largest_limit": 64 * plain_mean}
    # Negated, so that NaN does not pass.
    if not (
        report["mean_error"] <= report["mean_limit"] and report["largest_error"] <= report["largest_limit"]
    ):
        raise LabelsDiffer(
            f"the engine's {dtype} logits differ from transformers' by {report['mean_error']:.3g} on average and "
            f"{report['largest_error']:.3g} at most; {report['mean_limit']:.3g} and "
            f"{report['largest_limit']:.3g} are allowed. Nothing was timed; run the test suite to find the cause"
        )
    return report


def _engine_logits(engine: Engine, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """The logits of the prompt label, then those of each response token, in one row."""
    with engine.open(token_ids=ids[:_PROMPT_LEN], role="user") as stream:
        labels = engine.run()
        for start, end in ((0, 1), (1, 8), (8, _RESPONSE_LEN)):
            stream.append(ids[_PROMPT_LEN + start : _PROMPT_LEN + end])
            labels += engine.run()
        return np.concatenate([part for x in labels for part in (x.risk_logits, x.category_logits)])


def _hf_logits(out: GuardOutput) -> npt.NDArray[np.float32]:
    query = torch.cat([out.query_risk_level_logits, out.query_category_logits], -1)[0, _PROMPT_LEN - 1]
    response = torch.cat([out.risk_level_logits, out.category_logits], -1)[0, _PROMPT_LEN:]
    logits: npt.NDArray[np.float32] = torch.cat([query, response.flatten()]).float().numpy()
    return logits
