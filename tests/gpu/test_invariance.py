"""The same bits alone or in a crowd, in chunks of any size, after fork and rollback: the Triton backend, in Triton's
interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from feeding import VOCAB, poison
from invariance import CHECKS, MakeEngine, Plan, any_number_of_threads

from guardengine import Engine
from guardengine.kernels.gpu import SMALL_ROWS

LIMITS: dict[str, Any] = {
    "kv_cache_bytes": 2**21,
    "max_model_len": 512,
    "block_size": 16,
    "max_num_batched_tokens": SMALL_ROWS,  # in larger steps bits may differ: docs/guides/gpu.md
    "device": "cpu",
}
PLAN = Plan(
    prompt=40, response=20, chunks=(3, 13), budgets=(7,), block_sizes=(32,), crowd=3, crowd_block_sizes=(16,)
)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize(
    "check",
    [check for check in CHECKS if check is not any_number_of_threads],
    ids=lambda check: check.__name__,
)
def test_triton(check: Callable[[MakeEngine, Plan], None], checkpoints: Any, kv_dtype: str) -> None:
    # One layer less than usual: programs are what the interpreter's time goes into.
    folder: Path = checkpoints(vocab_size=VOCAB, dtype="float32", num_hidden_layers=2)

    def make(**options: Any) -> Engine:
        limits = LIMITS | {"kv_dtype": kv_dtype} | options
        return poison(Engine.from_pretrained(folder, backend="triton", **limits))

    check(make, PLAN)
