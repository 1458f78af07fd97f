"""paged_attention: causal attention of a ragged batch over the paged KV cache, planned on the host, one launch.

plan.py cuts the batch into items, attention_kernel.py computes them. A step of up to SMALL_ROWS rows is split over
segments of the keys, so that one stream with a long context keeps the whole GPU busy; in a larger one a program walks
all keys of a tile, and that changes no bit of the result. Prompts in larger steps are cut into tall tiles, which make
full use of the matrix units; their sums are in another order.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guardengine.kernels import SMALL_ROWS
from guardengine.kernels.gpu import plan as plans
from guardengine.kernels.gpu.attention_kernel import paged_attention_kernel
from guardengine.kernels.gpu.plan import plan_attention

# Keys multiplied at a time; part of the result's bits, so one number for all forms. With 64, the walking form needs
# more registers than there are (compiled for sm_80).
_BLOCK_KEYS = 32
_PROGRAMS_PER_MULTIPROCESSOR = 3  # as many as 168 registers a thread allow
_TALL_PROGRAMS_PER_MULTIPROCESSOR = 2
WIDE_MMA = (9, 10)  # compute capabilities, major, of GPUs for which `has_wide_mma` holds
_PROGRAMS_ON_CPU = 3  # Triton's interpreter


class AttentionScratch(NamedTuple):
    """Where segments wait to be merged. One serves all layers, one after another, and any steps after each other."""

    sums: Tensor  # [scratch rows, H, D] float32
    stats: Tensor  # [scratch rows, H, 2] float32: maximum, sum of weights
    counters: Tensor  # [scratch rows, Hkv] int32: segments done; zero between launches


def attention_scratch(
    num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> AttentionScratch:
    """Allocate scratch for split plans.

    Args:
        num_rows: Scratch rows at most (see `max_scratch_rows`).
        num_heads: H.
        num_kv_heads: Hkv.
        head_dim: D.
        device: Where to.
    """
    num_rows = max(num_rows, 1)
    return AttentionScratch(
        torch.empty((num_rows, num_heads, head_dim), dtype=torch.float32, device=device),
        torch.empty((num_rows, num_heads, 2), dtype=torch.float32, device=device),
        torch.zeros((num_rows, num_kv_heads), dtype=torch.int32, device=device),
    )


class TileRows(NamedTuple):
    """Rows of one stream that a program computes: `tile_rows` and `tall_rows` of the plans that the kernel takes."""

    tile_rows: int
    tall_rows: int


def attention_tile_rows(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, *, wide_mma: bool
) -> TileRows:
    """The tiles of a model on a GPU that has `wide_mma` or not."""
    group = num_heads // num_kv_heads
    return TileRows(_tile_m(group) // group, _tall_m(head_dim, dtype, wide_mma) // group)


def has_wide_mma(device: torch.device) -> bool:
    """Whether matrix instructions take their operands from shared memory (wgmma, tcgen05): taller tiles fit then."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in WIDE_MMA


def attention_config(
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    has_scales: bool,
    form: str,
    wide_mma: bool,
    is_hip: bool,
) -> dict[str, Any]:
    """Constants and compiler options that the kernel is launched with. `form`: "split", "walk" or "tall"."""
    group = num_heads // num_kv_heads
    config = {
        "GROUP": group,
        "NUM_KV_HEADS": num_kv_heads,
        "TILE_M": _tile_m(group),
        "BLOCK_KEYS": _BLOCK_KEYS,
        "HAS_SCALES": has_scales,
        # Block ids are loaded two stages before what they point to: 5 keep two tiles of keys in flight.
        "KEY_STAGES": 5,
        "FORM": form,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }
    if dtype == torch.float32:  # without tensor cores a tile takes more registers
        config |= {"KEY_STAGES": 2, "num_warps": 8}
    elif form == "tall":
        tall_m = _tall_m(head_dim, dtype, wide_mma)
        stages = 3 if tall_m == 128 else 4
        config |= {
            "TILE_M": tall_m,
            "BLOCK_KEYS": tall_m // 2,
            "KEY_STAGES": stages,
            "num_warps": tall_m // 16,
        }
    if is_hip:
        config["matrix_instr_nonkdim"] = 16  # the same instruction for both heights of tiles
    return config


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    positions: Tensor,
    softmax_scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Attend causally from a ragged batch of rows over the paged KV cache: `reference` has formula and arguments.

    Plans on the host, which waits for the device: where a plan serves many calls, use `planned_attention`.

    Raises:
        ValueError: For what `planned_attention` does not take.
    """
    num_heads, num_kv_heads, head_dim = q.shape[1], k_cache.shape[2], q.shape[2]
    split = len(q) <= SMALL_ROWS
    plan = plan_attention(
        cu_seqlens_q.cpu().numpy(),
        positions.cpu().numpy(),
        block_tables.cpu().numpy(),
        block_size=k_cache.shape[1],
        split=split,
        **attention_tile_rows(
            num_heads, num_kv_heads, head_dim, q.dtype, wide_mma=has_wide_mma(q.device)
        )._asdict(),
    )
    scratch = None
    if split:
        num_rows = int(plan[plans.NUM_SCRATCH_ROWS])
        scratch = attention_scratch(num_rows, num_heads, num_kv_heads, head_dim, q.device)
    return planned_attention(
        q, k_cache, v_cache, torch.from_numpy(plan).to(q.device), positions, softmax_scale, k_scales, v_scales,
        scratch=scratch,
    )  # fmt: skip


def planned_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: Tensor,
    positions: Tensor,
    softmax_scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    *,
    scratch: AttentionScratch | None,
    out: Tensor | None = None,
    num_programs: int | None = None,
    wide_mma: bool | None = None,
) -> Tensor:
    """`paged_attention` after a plan that is already on the device: one launch, two where it is not split; nothing is
    read back.

    Args:
        q: [T, H, D], float32, float16 or bfloat16; D a power of two from 16 on, H / Hkv at most 32.
        k_cache: [N, S, Hkv, D], in one of these dtypes, or int8 with scales.
        v_cache: The values', of the same shape and dtype.
        plan: int32, from `plan_attention` with this model's `attention_tile_rows`.
        positions: [T] int32 or int64.
        softmax_scale: Usually 1 / sqrt(D).
        k_scales: [N, Hkv, S] float32, of an int8 cache.
        v_scales: The values'.
        scratch: Of at least the plan's scratch rows if the plan is split; None if it is not.
        out: [T, H, D], whose rows that no item of the plan covers are left as they are. None: allocated.
        num_programs: Of a launch; by default what the device runs at once.
        wide_mma: By default `has_wide_mma` of the device.

    Returns:
        out, in q's dtype.

    Raises:
        ValueError: For shapes and dtypes that the kernel is not written for.
    """
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    _check(q, k_cache, v_cache, k_scales, v_scales)
    if out is None:
        out = torch.empty_like(q)
    forms = ["split"] if scratch is not None else ["walk"]
    if wide_mma is None:
        wide_mma = has_wide_mma(q.device)
    if scratch is None and _tall_m(head_dim, q.dtype, wide_mma):
        forms.append("tall")
    for form in forms:
        config = attention_config(
            q.dtype,
            num_heads,
            num_kv_heads,
            head_dim,
            has_scales=k_scales is not None,
            form=form,
            wide_mma=wide_mma,
            is_hip=torch.version.hip is not None and q.is_cuda,
        )
        paged_attention_kernel[(num_programs or attention_programs(q.device, form),)](
            out, q, k_cache, v_cache, k_scales, v_scales, positions, plan, *(scratch or (None, None, None)),
            softmax_scale * math.log2(math.e), HEAD_DIM=head_dim, BLOCK_SIZE=block_size, **config,
        )  # fmt: skip
    return out


def attention_programs(device: torch.device, form: str) -> int:
    """Programs of a launch: what the device runs at once."""
    if device.type == "cpu":
        return _PROGRAMS_ON_CPU
    each = _TALL_PROGRAMS_PER_MULTIPROCESSOR if form == "tall" else _PROGRAMS_PER_MULTIPROCESSOR
    return each * torch.cuda.get_device_properties(device).multi_processor_count


def _tile_m(group: int) -> int:
    if group > 32:
        raise ValueError(f"{group} query heads share a key/value head: at most 32 are supported")
    return 16 if group <= 16 else 32


def _tall_m(head_dim: int, dtype: torch.dtype, wide_mma: bool) -> int:
    """Members of a tall tile, as many as registers take; 0 where that is none: without matrix instructions."""
    if dtype == torch.float32:
        return 0
    return 128 if wide_mma and head_dim <= 128 else 64


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scales: Tensor | None, v_scales: Tensor | None
) -> None:
    head_dim = q.shape[2]
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim={head_dim}: must be a power of two, at least 16")
    if (k_cache.dtype == torch.int8) != (k_scales is not None and v_scales is not None):
        raise ValueError(f"{k_cache.dtype} caches: int8 caches have scales, others have none")
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k_scales": k_scales, "v_scales": v_scales}
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is not contiguous")
