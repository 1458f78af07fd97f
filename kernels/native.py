"""The compiled library's CPU kernels for tensors: threads, packed weights, matrix products.

Owns handles, not tensors: whoever passes a pointer keeps its tensor alive. `Workers` are the threads and the
instruction set that everything native runs with.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from . import abi
from . import library as compiled

# By quantization scheme.
FORMATS = {None: abi.Format.FULL, "int8": abi.Format.INT8_WEIGHTS, "w8a8": abi.Format.W8A8}
DTYPES = {torch.float32: abi.Dtype.FLOAT32, torch.bfloat16: abi.Dtype.BFLOAT16, torch.int8: abi.Dtype.INT8}
ISAS = ("avx512bf16", "avx512", "avx2", "portable")


def library() -> ctypes.CDLL:
    """The compiled library. Raises OSError where it cannot be used."""
    return compiled.open_library(compiled.path)


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

    Args:
        isa: One of `usable_isas`.
        num_threads: Of which the calling thread is one.
        cpus: A CPU for each thread to stay on; the calling thread stays where it is. None: they move freely.

    Raises:
        MemoryError: The threads cannot be started.
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
    """A weight matrix in the kernels' own layout, for rows of its dtype.

    Args:
        workers: Whose instruction set decides the layout.
        weight: [N, K], float32 or bfloat16; copied.
        scheme: "int8" or "w8a8": rounded. None: as it is.
    """

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
    """x weight^T.

    Args:
        workers: Those that the weight was packed with.
        x: [T, K].
        weight: [N, K].
        is_float_out: Whether the result stays in float32.

    Returns:
        [T, N], in x's dtype or in float32.

    Raises:
        ValueError: x's dtype is not the one that the weight was packed from.
        MemoryError: There is no memory for the rows.
    """
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
