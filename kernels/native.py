"""The compiled library's C ABI for the CPU kernels (csrc/step.h), declared for ctypes.

Owns handles, not tensors: whoever passes a pointer keeps its tensor alive. `Workers` are the threads and the
instruction set that everything native runs with.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library as compiled

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # GeDtype; int8: of a KV cache only
FORMATS = {None: 0, "int8": 1, "w8a8": 2}  # GeFormat, by quantization scheme
MAX_GROUP, MAX_HEAD_DIM, MAX_INNER = 256, 512, 1 << 16  # kMaxGroup, kMaxHeadDim, kMaxInner in csrc/kernels.h
KEY_GROUP = 16  # kKeyGroup: a KV cache with blocks of a multiple of it is multiplied with in place
ISAS = ("avx512bf16", "avx512", "avx2", "portable")

_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
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
        [
            c_void_p,
            c_int,
            c_void_p,
            c_void_p,
            c_int,
            c_void_p,
            c_int,
            c_void_p,
            c_int,
            c_void_p,
            c_float,
            c_void_p,
        ],
    ),
}


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
        *(
            (name, c_void_p)
            for name in ("block_tables", "label_index", "label_positions", "label_cu_seqlens")
        ),
        *((name, c_void_p) for name in ("kv_cache", "kv_scales", "out")),
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


@cache
def library() -> ctypes.CDLL:
    """Load the compiled library and declare its functions. Raises OSError or AttributeError where it does not fit."""
    loaded = compiled.open_library(compiled.path)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def usable_isas() -> tuple[str, ...]:
    """The instruction sets that kernels exist for and this CPU has, the one to prefer first."""
    return tuple(library().ge_kernel_isas().decode().split())


def choose_isa() -> str:
    """The instruction set to run: GUARDENGINE_ISA where it is set, else the preferred one. Raises ValueError."""
    usable = usable_isas()
    wanted = os.environ.get("GUARDENGINE_ISA")
    if not wanted:
        return usable[0]
    if wanted not in usable:
        problem = "this CPU or build lacks it" if wanted in ISAS else "there is no such instruction set"
        raise ValueError(
            f"GUARDENGINE_ISA={wanted!r}: {problem}; choose one of {', '.join(usable)}, or unset it"
        )
    return wanted


class Workers:
    """A team of threads that runs the kernels of one instruction set; freed with the object or by `close`.

    With `cpus`, one for each thread, they stay there; the calling thread, which works too, stays where it is.
    """

    def __init__(self, isa: str, num_threads: int, cpus: Sequence[int] | None = None) -> None:
        self.isa, self.num_threads = isa, num_threads
        places = None if cpus is None else (c_int * num_threads)(*cpus)
        self.handle = library().ge_workers_create(isa.encode(), num_threads, places)
        if not self.handle:
            raise MemoryError(
                f"{num_threads} threads cannot be started{'' if cpus is None else f' on CPUs {list(cpus)}'}: "
                "use fewer, or raise the limit (ulimit -u)"
            )
        self._pid = os.getpid()
        self.close = weakref.finalize(self, _destroy_workers, self._pid, self.handle)

    def check_process(self) -> None:
        """Raise RuntimeError in a forked child: threads do not survive a fork, and a step would wait for them."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this engine was made before os.fork(), which its threads do not survive; make one in each process"
            )


def _destroy_workers(pid: int, handle: int) -> None:
    if os.getpid() == pid:  # a forked child has no threads to join
        library().ge_workers_destroy(handle)


class Packed:
    """A weight matrix [N, K] in the kernels' own layout for rows of its dtype, rounded to int8 under a scheme."""

    def __init__(self, workers: Workers, weight: Tensor, scheme: str | None = None) -> None:
        self.shape, self.dtype, self.format = weight.shape, weight.dtype, FORMATS[scheme]
        # Steps of four k at most. Zeros at the end of a row change no sum and no scale.
        weight = F.pad(weight, (0, -weight.shape[1] % 4)).contiguous()
        arguments = (DTYPES[weight.dtype], self.format)
        num_bytes = library().ge_packed_bytes(workers.handle, *arguments, *weight.shape)
        self.data = torch.empty(num_bytes + 64, dtype=torch.uint8)
        self.address = (self.data.data_ptr() + 63) // 64 * 64
        library().ge_pack(workers.handle, *arguments, weight.data_ptr(), *weight.shape, self.address)


def linear(workers: Workers, x: Tensor, weight: Packed, *, is_float_out: bool) -> Tensor:
    """x weight^T, in x's dtype or in float32.  Shapes: x [T, K] -> [T, N].  Raises ValueError for unequal dtypes."""
    if x.dtype != weight.dtype:
        raise ValueError(f"rows of {x.dtype}, weight packed from {weight.dtype}: equal dtypes are needed")
    x = F.pad(x, (0, -x.shape[1] % 4)).contiguous()
    out = torch.empty(len(x), weight.shape[0], dtype=torch.float32 if is_float_out else x.dtype)
    status = library().ge_linear(
        workers.handle,
        DTYPES[x.dtype],
        weight.format,
        x.data_ptr(),
        *x.shape,
        weight.address,
        weight.shape[0],
        out.data_ptr(),
        is_float_out,
    )
    check(status)
    return out


def pointers(tensors: Sequence[Tensor]) -> tuple[object, object, int]:
    """(addresses, row counts, how many) of matrices, as ge_model_pack takes them."""
    count = len(tensors)
    return (
        (c_void_p * count)(*(tensor.data_ptr() for tensor in tensors)),
        (c_int64 * count)(*(len(tensor) for tensor in tensors)),
        count,
    )


def check(status: int) -> None:
    """Raise MemoryError for a native call that found no memory; it changed nothing."""
    if status:
        raise MemoryError("no memory for this batch's rows: free some, or lower max_num_batched_tokens")
