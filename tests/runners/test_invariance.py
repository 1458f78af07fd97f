"""The same bits alone or in a crowd, in chunks of any size, after fork and rollback, on 1 to 8 threads: every mode of
the cpu backend, for every instruction set of this machine, and the reference up to its rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from feeding import VOCAB, poison
from invariance import CHECKS, MakeEngine, Plan, any_block_size, any_number_of_threads, any_token_budget
from pairwise import grid

from guardengine import Engine
from guardengine.kernels import native

Check = Callable[[MakeEngine, Plan], None]
# `make check` has the checks that load one engine or two, in every mode.
MARKED = [
    pytest.param(check, id=check.__name__, marks=pytest.mark.slow if loads_many else ())
    for check in CHECKS
    for loads_many in [check in (any_token_budget, any_block_size, any_number_of_threads)]
]
OTHER = {"float32": "bfloat16", "bfloat16": "float32"}
LIMITS: dict[str, Any] = {"kv_cache_bytes": 2**22, "max_model_len": 512, "block_size": 4}


@pytest.fixture(scope="module")
def folder(checkpoints: Callable[..., Path]) -> Path:
    """Stored in bf16: every dtype then rounds the same numbers to int8."""
    return checkpoints(vocab_size=VOCAB, dtype="bfloat16")


# Triples: the kernels of linear differ by (quantization, dtype, isa), those of attention by (kv_dtype, dtype, isa).
@pytest.mark.slow
@pytest.mark.parametrize("check", MARKED)
@grid(
    3,
    quantization=[None, "int8", "w8a8"],
    kv_dtype=["auto", "int8", "another"],
    dtype=["float32", "bfloat16"],
    isa=native.usable_isas(),
)
def test_cpu(
    check: Check,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantization: str | None,
    kv_dtype: str,
    dtype: str,
    isa: str,
) -> None:
    monkeypatch.setenv("GUARDENGINE_ISA", isa)
    mode = {
        "quantization": quantization,
        "kv_dtype": OTHER[dtype] if kv_dtype == "another" else kv_dtype,
        "dtype": dtype,
    }

    def make(**options: Any) -> Engine:
        engine = Engine.from_pretrained(folder, backend="cpu", **(LIMITS | mode | options))
        assert engine.stats()["isa"] == isa
        return poison(engine)

    check(make, Plan())


@pytest.mark.parametrize("check", MARKED)
def test_reference(check: Check, tiny: Path) -> None:
    """PyTorch's sums depend on how many rows a product has: close, not equal."""

    def make(**options: Any) -> Engine:
        return poison(Engine.from_pretrained(tiny, backend="reference", **(LIMITS | options)))

    check(make, Plan(is_exact=False))
