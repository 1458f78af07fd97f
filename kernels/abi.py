"""The compiled library's C ABI (csrc/step.h, csrc/probe.h), written down once more for ctypes.

ctypes checks nothing: a struct that is one field longer here than there makes the library read something else. So it
tells what it was compiled with (`ge_abi`), and `declare` compares that with what is written here.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from enum import IntEnum
from typing import Any

MAX_GROUP, MAX_HEAD_DIM, MAX_INNER = 256, 512, 1 << 16  # kMaxGroup, kMaxHeadDim, kMaxInner in csrc/kernels.h
KEY_GROUP = 16  # kKeyGroup: a KV cache with blocks of a multiple of it is multiplied with in place


class Dtype(IntEnum):
    """GeDtype."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2  # of a KV cache only


class Format(IntEnum):
    """GeFormat: how a matrix is stored."""

    FULL = 0
    INT8_WEIGHTS = 1
    W8A8 = 2


class Matrix(IntEnum):
    """GeMatrix: the matrices of a layer, then those of the guard heads."""

    QKV = 0
    O = 1  # noqa: E741
    GATE_UP = 2
    DOWN = 3
    PRE = 4
    RESPONSE = 5
    QUERY = 6


class Peak(IntEnum):
    """GePeak: an arithmetic peak to probe."""

    FP32 = 0
    BF16 = 1
    INT8 = 2


class Status(IntEnum):
    """GeStatus: what a call returns."""

    OK = 0
    BAD_ARGUMENT = -1
    NO_MEMORY = -2
    NO_THREADS = -3


class ModelStruct(ctypes.Structure):
    """GeModelConfig."""

    _fields_ = (
        *((name, c_int32) for name in ("num_layers", "hidden", "num_heads", "num_kv_heads", "head_dim")),
        *((name, c_int32) for name in ("intermediate", "guard_inner", "response_logits", "query_logits")),
        *((name, c_int32) for name in ("dtype", "kv_dtype", "block_size", "format")),
        ("eps", c_float),
        *((name, c_void_p) for name in ("embed", "layer_norms", "final_norm", "guard_norms", "cos_sin")),
    )


class BatchStruct(ctypes.Structure):
    """GeBatch."""

    _fields_ = (
        *((name, c_int32) for name in ("num_tokens", "num_streams", "blocks_per_table", "num_labels")),
        *((name, c_void_p) for name in ("input_ids", "positions", "cu_seqlens", "slot_mapping")),
        *((name, c_void_p) for name in ("block_tables", "label_index", "label_positions")),
        *((name, c_void_p) for name in ("label_cu_seqlens", "kv_cache", "kv_scales", "out")),
    )


class CacheStruct(ctypes.Structure):
    """GeCache."""

    _fields_ = (
        *((name, c_int32) for name in ("num_heads", "num_kv_heads", "head_dim", "block_size")),
        *((name, c_int32) for name in ("kv_dtype", "is_tiled")),
        *((name, c_int64) for name in ("block_stride", "token_stride", "head_stride")),
        *((name, c_int64) for name in ("scale_block_stride", "scale_head_stride")),
        *((name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
    )


_STRUCTS: dict[str, type[ctypes.Structure]] = {
    "GeModelConfig": ModelStruct,
    "GeBatch": BatchStruct,
    "GeCache": CacheStruct,
}
_ENUMS: dict[str, type[IntEnum]] = {
    "GeDtype": Dtype,
    "GeFormat": Format,
    "GeMatrix": Matrix,
    "GePeak": Peak,
    "GeStatus": Status,
}
_LIMITS = {
    "kKeyGroup": KEY_GROUP,
    "kMaxGroup": MAX_GROUP,
    "kMaxHeadDim": MAX_HEAD_DIM,
    "kMaxInner": MAX_INNER,
}

# Name -> (result, arguments).
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ge_isa": (c_char_p, []),
    "ge_probe_read": (c_int, [c_int, c_size_t, c_int, POINTER(c_double), POINTER(c_double)]),
    "ge_probe_peak": (c_int, [c_int, c_int, c_double, POINTER(c_double)]),
    "ge_kernel_isas": (c_char_p, []),
    "ge_workers_create": (c_void_p, [c_char_p, c_int, POINTER(c_int)]),
    "ge_workers_destroy": (None, [c_void_p]),
    "ge_model_create": (c_void_p, [c_void_p, c_void_p]),
    "ge_model_destroy": (None, [c_void_p]),
    "ge_model_pack": (None, [c_void_p, c_int, c_int, POINTER(c_void_p), POINTER(c_int64), c_int]),
    "ge_step": (c_int, [c_void_p, c_void_p]),
    "ge_packed_bytes": (c_int64, [c_void_p, *[c_int] * 4]),
    "ge_pack": (None, [c_void_p, c_int, c_int, c_void_p, c_int, c_int, c_void_p]),
    "ge_linear": (c_int, [c_void_p, c_int, c_int, c_void_p, c_int, c_int, c_void_p, c_int, c_void_p, c_int]),
    "ge_rms_norm": (c_int, [c_void_p, c_int, c_void_p, c_void_p, c_float, c_int, c_int, c_void_p]),
    "ge_silu_and_mul": (c_int, [c_void_p, c_int, c_void_p, c_int, c_int, c_void_p]),
    "ge_qk_norm_rope_store_kv": (
        c_int,
        [c_void_p, c_int, c_void_p, c_void_p, c_int, *[c_void_p] * 5, c_float, c_void_p],
    ),
    "ge_paged_attention": (
        c_int,
        [c_void_p, c_int, c_void_p, c_void_p, c_int, c_void_p, c_int, c_void_p, c_int, c_void_p, c_float, c_void_p],
    ),
}  # fmt: skip


def declare(library: ctypes.CDLL) -> None:
    """Check that a library was compiled with what is written here, and declare its functions' types.

    Args:
        library: A library that was just opened.

    Raises:
        OSError: It was not; the message names each difference, or the function that is missing.
    """
    try:
        library.ge_abi.restype, library.ge_abi.argtypes = c_char_p, []
        differences = _differences(library.ge_abi().decode())
        if differences:
            raise OSError("; ".join(differences))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise OSError(f"it lacks a function, {error}") from None


def _differences(facts: str) -> list[str]:
    """Where a library's facts, "name=number" separated by spaces, are others than those written here."""
    theirs = dict(fact.split("=") for fact in facts.split())
    ours = {name: ctypes.sizeof(struct) for name, struct in _STRUCTS.items()}
    ours |= {name: len(enum) for name, enum in _ENUMS.items()} | _LIMITS
    return [
        f"{name} is {theirs.get(name, 'unknown')} in the library, {ours.get(name, 'unknown')} in Python"
        for name in ours | theirs
        if theirs.get(name) != str(ours.get(name))
    ]
