"""Every kernel that the published models run, as the calls that launch it: to be compiled ahead of time.

A call works on meta tensors, so it launches nothing. What watches it sees the very arguments, constants and options
that the engine's call would give Triton: nothing is listed twice that could then differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from guardengine.kernels.gpu.attention import attention_scratch, planned_attention
from guardengine.kernels.gpu.heads import ClassifierSizes, guard_heads, guard_scores, guard_scores_scratch
from guardengine.kernels.gpu.linear import linear, linear_add, norm_gate_up, norm_linear
from guardengine.kernels.gpu.linear_config import (
    GATED,
    NORMED,
    SUMMED,
    default_config,
)
from guardengine.kernels.gpu.plan import max_plan_size, max_scratch_rows
from guardengine.kernels.gpu.qkv import qk_norm_rope_store_kv
from guardengine.kernels.gpu.rows import fused_add_rms_norm, rms_norm, silu_and_mul
from guardengine.kernels.gpu.workspace import Workspace, allocate_workspace

EPS = 1e-6
SMALL_STEPS = (16, 64)  # rows: one step for each of the kernels' two tiles of rows
LARGE_STEP = 512
MAX_LENGTH = 32768  # tokens of a stream
BLOCK_SIZE = 16  # tokens of a KV cache block
CLASSES = ClassifierSizes(3, 8, 3, 9)


class Compiled(NamedTuple):
    """One configuration of one operator."""

    name: str
    launch: Callable[[], object]  # calls the operator, on meta tensors
    hot: bool  # runs in every layer of a small step: may not spill
    needs_mma: bool  # is nothing without matrix instructions


class Sizes(NamedTuple):
    """A published model, in the letters of guardengine.kernels."""

    E: int
    H: int
    HKV: int
    D: int
    F: int
    G: int = 512
    V: int = 151936


MODELS = {
    "0.6B": Sizes(1024, 16, 8, 128, 3072),
    "4B": Sizes(2560, 32, 8, 128, 9728),
    "8B": Sizes(4096, 32, 8, 128, 12288),
}


def configurations(num_sms: int, *, wide_mma: bool, dtype: torch.dtype = torch.bfloat16) -> list[Compiled]:
    """List what runs on a GPU with that many multiprocessors.

    The matrix products of small steps are in the configurations chosen by rule; what tuning may choose instead is not
    listed.
    """
    found: list[Compiled] = []
    for model, sizes in MODELS.items():
        for num_rows in SMALL_STEPS:
            found += _products(model, sizes, num_rows, num_sms, dtype)
            found += _small_step(model, sizes, num_rows, num_sms, dtype)
        found += _large_step(model, sizes, num_sms, wide_mma, dtype)
    return found


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _products(
    model: str,
    sizes: Sizes,
    num_rows: int,
    num_sms: int,
    dtype: torch.dtype,
) -> Iterator[Compiled]:
    weights = (
        ("qkv", NORMED, ((sizes.H + 2 * sizes.HKV) * sizes.D, sizes.E)),
        ("o", SUMMED, (sizes.E, sizes.H * sizes.D)),
        ("gate_up", GATED, (2 * sizes.F, sizes.E)),
        ("down", SUMMED, (sizes.E, sizes.F)),
    )
    for name, operator, shape in weights:
        config = default_config(operator, shape, dtype=dtype, num_sms=num_sms)
        workspace = allocate_workspace({(operator, shape): config}, "meta")
        launch = partial(_product, operator, shape, num_rows, dtype, workspace)
        yield Compiled(f"{operator} {name} {model}, {num_rows} rows", launch, True, True)


def _product(
    operator: str, shape: tuple[int, int], num_rows: int, dtype: torch.dtype, workspace: Workspace
) -> None:
    columns, inner = shape
    x, weight, norm = (
        _empty(num_rows, inner, dtype=dtype),
        _empty(columns, inner, dtype=dtype),
        _empty(inner, dtype=dtype),
    )
    if operator == NORMED:
        norm_linear(x, norm, EPS, weight, workspace=workspace)
    elif operator == GATED:
        norm_gate_up(x, norm, EPS, weight, workspace=workspace)
    else:
        linear_add(x, weight, _empty(num_rows, columns, dtype=dtype), workspace=workspace)


def _small_step(
    model: str, sizes: Sizes, num_rows: int, num_sms: int, dtype: torch.dtype
) -> Iterator[Compiled]:
    label = f"{model}, {num_rows} rows"
    for cache in (dtype, torch.int8):
        suffix = ", int8 cache" if cache == torch.int8 else ""
        store = partial(_store, sizes, num_rows, dtype, cache)
        yield Compiled(f"qk_norm_rope_store_kv {label}{suffix}", store, True, False)
        attend = partial(_attend, sizes, num_rows, num_sms, False, dtype, cache)
        yield Compiled(f"paged_attention {label}{suffix}", attend, True, True)
    x, head = _empty(num_rows, sizes.E, dtype=dtype), _empty(sizes.V, sizes.E, dtype=dtype)
    yield Compiled(f"linear lm_head {label}", partial(linear, x, head), False, True)
    yield Compiled(f"guard_scores {label}", partial(_scores, sizes, num_rows, dtype), True, True)


def _cache(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Keys or values of the longest stream, and scales where they are int8."""
    num_blocks = MAX_LENGTH // BLOCK_SIZE
    cache = _empty(num_blocks, BLOCK_SIZE, sizes.HKV, sizes.D, dtype=dtype)
    if dtype != torch.int8:
        return cache, None
    return cache, _empty(num_blocks, sizes.HKV, BLOCK_SIZE, dtype=torch.float32)


def _store(sizes: Sizes, num_rows: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    cache, scales = _cache(sizes, cache_dtype)
    norm, indices = _empty(sizes.D, dtype=dtype), _empty(num_rows, dtype=torch.int32)
    qk_norm_rope_store_kv(
        _empty(num_rows, (sizes.H + 2 * sizes.HKV) * sizes.D, dtype=dtype),
        norm,
        norm,
        _empty(MAX_LENGTH, sizes.D, dtype=torch.float32),
        indices,
        indices,
        cache,
        cache,
        EPS,
        scales,
        scales,
    )


def _attend(
    sizes: Sizes, num_rows: int, num_sms: int, wide_mma: bool, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    cache, scales = _cache(sizes, cache_dtype)
    scratch = None
    if num_rows <= max(SMALL_STEPS):
        scratch_rows = max_scratch_rows(num_rows, MAX_LENGTH)
        scratch = attention_scratch(scratch_rows, sizes.H, sizes.HKV, sizes.D, torch.device("meta"))
    planned_attention(
        _empty(num_rows, sizes.H, sizes.D, dtype=dtype),
        cache,
        cache,
        _empty(max_plan_size(num_rows, MAX_LENGTH, MAX_LENGTH // BLOCK_SIZE, split=True), dtype=torch.int32),
        _empty(num_rows, dtype=torch.int32),
        sizes.D**-0.5,
        scales,
        scales,
        scratch=scratch,
        num_programs=num_sms,
        wide_mma=wide_mma,
    )


def _scores(sizes: Sizes, num_rows: int, dtype: torch.dtype) -> None:
    response, query = CLASSES[0] + CLASSES[1], CLASSES[2] + CLASSES[3]
    scratch = guard_scores_scratch(num_rows, sizes.G, CLASSES)
    guard_scores(
        _empty(num_rows, sizes.E, dtype=dtype),
        _empty(num_rows, dtype=torch.int32),
        _empty(1, dtype=torch.int32),
        _empty(sizes.E, dtype=dtype),
        _empty(2 * sizes.G, sizes.E, dtype=dtype),
        _empty(2, sizes.G, dtype=dtype),
        _empty(response, sizes.G, dtype=dtype),
        _empty(query, sizes.G, dtype=dtype),
        EPS,
        CLASSES,
        out=_empty(num_rows, 2 * (response + query) + 4, dtype=torch.float32),
        workspace=allocate_workspace({}, "meta", others=[scratch]),
    )


def _large_step(
    model: str, sizes: Sizes, num_sms: int, wide_mma: bool, dtype: torch.dtype
) -> Iterator[Compiled]:
    """Steps of many rows; the matrix products are torch's."""
    num_rows = LARGE_STEP

    def norm() -> None:
        rms_norm(_empty(num_rows, sizes.E, dtype=dtype), _empty(sizes.E, dtype=dtype), EPS)

    def add_norm() -> None:
        x, residual = (_empty(num_rows, sizes.E, dtype=dtype) for _ in range(2))
        fused_add_rms_norm(x, residual, _empty(sizes.E, dtype=dtype), EPS)

    def activation() -> None:
        silu_and_mul(_empty(num_rows, 2 * sizes.F, dtype=dtype))

    def classify() -> None:
        response, query = CLASSES[0] + CLASSES[1], CLASSES[2] + CLASSES[3]
        guard_heads(
            _empty(num_rows, sizes.E, dtype=dtype),
            _empty(sizes.E, dtype=dtype),
            _empty(2 * sizes.G, sizes.E, dtype=dtype),
            _empty(2, sizes.G, dtype=dtype),
            _empty(response, sizes.G, dtype=dtype),
            _empty(query, sizes.G, dtype=dtype),
            EPS,
        )

    for cache in (dtype, torch.int8):
        name = f"paged_attention {model}, {num_rows} rows{', int8 cache' if cache == torch.int8 else ''}"
        yield Compiled(name, partial(_attend, sizes, num_rows, num_sms, wide_mma, dtype, cache), False, True)
    yield Compiled(f"rms_norm {model}", norm, False, False)
    yield Compiled(f"fused_add_rms_norm {model}", add_norm, False, False)
    yield Compiled(f"silu_and_mul {model}", activation, False, False)
    yield Compiled(f"guard_heads {model}", classify, False, True)
