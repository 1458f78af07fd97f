"""The checks of compiled kernels: each kind of bad kernel, planted, is complained of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_compiler import (
    GPUS,
    Measured,
    compile_all,
    complaints,
    is_wide,
    read_sass,
    record,
)
from torch import Tensor


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@triton.jit
def _product_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    inner,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    USE_DOT: tl.constexpr,
):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros([M, N], tl.float32)
    for start in range(0, inner, K):
        a = tl.load(a_ptr + m[:, None] * inner + start + k[None, :])
        b = tl.load(b_ptr + n[:, None] * inner + start + k[None, :])
        if USE_DOT:
            acc = tl.dot(a, tl.trans(b), acc)
        else:
            acc += tl.sum(a[:, None, :].to(tl.float32) * b[None, :, :].to(tl.float32), axis=2)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc)


def product(
    gpu: str, m: int, n: int, k: int, *, inner: int = 1024, use_dot: bool = True, **options: Any
) -> Measured:
    def launch() -> None:
        _product_kernel[(1,)](
            meta(m, inner),
            meta(n, inner),
            meta(m, n, dtype=torch.float32),
            inner,
            m,
            n,
            k,
            use_dot,
            **options,
        )

    (measured,) = compile_all(record(launch, GPUS[gpu].target), processes=1)
    return measured


@pytest.mark.parametrize("gpu", GPUS)
def test_a_good_kernel_passes(gpu: str) -> None:
    measured = product(gpu, 16, 64, 64)
    assert measured.mma
    assert is_wide(measured.loads)
    assert complaints(measured, GPUS[gpu], hot=True, needs_mma=True, before=measured._asdict()) == []


@pytest.mark.parametrize(
    ("gpu", "m", "name"), [("sm_80", 128, "HMMA"), ("sm_90", 128, "HGMMA"), ("sm_90", 32, "HMMA")]
)
def test_matrix_instructions_are_told_apart(gpu: str, m: int, name: str) -> None:
    assert [*product(gpu, m, 64, 64).mma] == [name]


@pytest.mark.parametrize("gpu", ["sm_80", "gfx942"])
def test_spills_are_seen(gpu: str) -> None:
    measured = product(gpu, 128, 512, 32, num_warps=4 if gpu == "sm_80" else 1, num_stages=1)
    assert measured.spills > 100
    assert measured.stack > 100
    assert ["spills" in text for text in complaints(measured, GPUS[gpu], hot=True, needs_mma=True)] == [True]
    assert complaints(measured, GPUS[gpu], hot=False, needs_mma=True) == []


SASS = """
        /*0000*/                   STL [R1], R3 ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDL R9, [R1] ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   LDL.LU R9, [R1] ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
"""


def test_loops_are_told_apart() -> None:
    in_loop = [(name, looped) for name, looped in read_sass(SASS) if name.startswith(("STL", "LDL", "LDG"))]
    assert in_loop == [("STL", False), ("LDG.E.128", True), ("LDL", True), ("LDL.LU", False)]


@pytest.mark.parametrize("gpu", ["sm_80", "sm_86"])
def test_how_many_spills_are_forgiven(gpu: str) -> None:
    """None where we promise none; elsewhere a few outside of loops are forgiven."""
    most = GPUS[gpu].most_spills
    few = Measured(64, most, 0, 16, 4096, {"HMMA": 8}, {"16": 4})
    assert complaints(few, GPUS[gpu], hot=True, needs_mma=True) == []
    for bad in (few._replace(spills=most + 1), few._replace(looped_spills=1)):
        (text,) = complaints(bad, GPUS[gpu], hot=True, needs_mma=True)
        assert "spills" in text
    assert bool(most) == (gpu == "sm_86")


def test_shared_memory_past_the_gpu_is_seen() -> None:
    """Triton compiles it without a word; 160 KiB fit sm_80 and not sm_86."""
    options = {"num_warps": 8, "num_stages": 6}
    large, small = (product(gpu, 128, 128, 64, **options) for gpu in ("sm_80", "sm_86"))
    assert complaints(large, GPUS["sm_80"], hot=False, needs_mma=True) == []
    (text,) = complaints(small, GPUS["sm_86"], hot=False, needs_mma=True)
    assert "cannot be launched" in text


def test_a_missing_matrix_instruction_is_seen() -> None:
    measured = product("sm_80", 16, 16, 32, use_dot=False)
    assert complaints(measured, GPUS["sm_80"], hot=True, needs_mma=False) == []
    assert complaints(measured, GPUS["sm_80"], hot=True, needs_mma=True) == ["has no matrix instruction"]


@triton.jit
def _copy_kernel(x_ptr, out_ptr, size, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < size), mask=i < size)


@pytest.mark.parametrize("gpu", ["sm_80", "gfx942"])
def test_narrow_loads_are_seen(gpu: str) -> None:
    """A size that is no multiple of 16 leaves Triton no wide load."""

    def copy(size: int) -> Measured:
        (measured,) = compile_all(
            record(lambda: _copy_kernel[(1,)](meta(size), meta(size), size, 2048), GPUS[gpu].target),
            processes=1,
        )
        return measured

    wide, narrow = copy(4096), copy(4095)
    assert is_wide(wide.loads)
    assert not is_wide(narrow.loads)
    (text,) = complaints(
        narrow._replace(registers=wide.registers), GPUS[gpu], hot=True, needs_mma=False, before=wide._asdict()
    )
    assert "16 bytes" in text


@pytest.mark.parametrize("field", ["registers", "spills", "looped_spills", "stack", "shared"])
def test_growth_is_seen(field: str) -> None:
    good = Measured(40, 0, 0, 0, 4096, {"HMMA": 8}, {"16": 4})
    grown = good._replace(**{field: getattr(good, field) + 1})
    assert complaints(good, GPUS["sm_80"], hot=False, needs_mma=True, before=grown._asdict()) == []
    (text,) = complaints(grown, GPUS["sm_80"], hot=False, needs_mma=True, before=good._asdict())
    assert text.startswith(field)


def test_another_matrix_instruction_is_seen() -> None:
    before = Measured(40, 0, 0, 0, 4096, {"HMMA": 8}, {"16": 4})
    after = before._replace(mma={"HGMMA": 2})
    (text,) = complaints(after, GPUS["sm_90"], hot=True, needs_mma=True, before=before._asdict())
    assert "round otherwise" in text


def test_a_misspelt_option_is_an_error() -> None:
    with pytest.raises(KeyError, match="num_warp"):
        product("sm_80", 16, 16, 32, num_warp=4)
