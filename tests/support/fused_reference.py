"""A backend with the fused operators of guardengine.kernels.gpu, made of reference operators on the CPU.

For tests of what runs operators, without Triton: it counts launches, notes which memory each touches, and has a plan
format of its own, since nobody but a backend's attention may look into a plan.
"""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from guardengine.kernels import reference

__name__ = "fused_reference"

launches: Counter[str] = Counter()
touched: set[int] = set()  # addresses of the storages that launches were given

NORMED, GATED, SUMMED = "norm_linear", "norm_gate_up", "linear_add"


class ClassifierSizes(NamedTuple):
    response_risks: int
    response_categories: int
    query_risks: int
    query_categories: int


def _launched(name: str, *tensors: Tensor | None) -> None:
    launches[name] += 1
    touched.update(tensor.untyped_storage().data_ptr() for tensor in tensors if tensor is not None)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    _launched("linear", x, weight)
    return reference.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _launched("rms_norm", x, weight)
    return reference.rms_norm(x, weight, eps)


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _launched("fused_add_rms_norm", x, residual)
    return reference.fused_add_rms_norm(x, residual, weight, eps)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    _launched("silu_and_mul", gate_up)
    return reference.silu_and_mul(gate_up)


def norm_linear(x: Tensor, norm: Tensor, eps: float, weight: Tensor, *, workspace: SimpleNamespace) -> Tensor:
    workspace.check(NORMED, weight)
    _launched(NORMED, x, weight)
    return reference.linear(reference.rms_norm(x, norm, eps), weight)


def norm_gate_up(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, *, workspace: SimpleNamespace
) -> Tensor:
    workspace.check(GATED, weight)
    _launched(GATED, x, weight)
    return reference.silu_and_mul(reference.linear(reference.rms_norm(x, norm, eps), weight))


def linear_add(x: Tensor, weight: Tensor, residual: Tensor, *, workspace: SimpleNamespace) -> Tensor:
    workspace.check(SUMMED, weight)
    _launched(SUMMED, x, weight, residual)
    return residual.add_(reference.linear(x, weight))


def qk_norm_rope_store_kv(
    qkv, q_norm, k_norm, cos_sin, positions, slot_mapping, k_cache, v_cache, eps, k_scales=None, v_scales=None
):  # fmt: skip
    _launched("qk_norm_rope_store_kv", qkv, positions, slot_mapping, k_cache, k_scales)
    stored = slot_mapping >= 0
    q = reference.qk_norm_rope_store_kv(
        qkv, q_norm, k_norm, cos_sin, positions.long(), torch.where(stored, slot_mapping, 0).long(),
        torch.empty_like(k_cache), torch.empty_like(v_cache), eps,
        *(None if scales is None else torch.empty_like(scales) for scales in (k_scales, v_scales)),
    )  # fmt: skip
    if not stored.any():
        return q
    reference.qk_norm_rope_store_kv(
        qkv[stored], q_norm, k_norm, cos_sin, positions[stored].long(), slot_mapping[stored].long(),
        k_cache, v_cache, eps, k_scales, v_scales,
    )  # fmt: skip
    return q


def planned_attention(
    q, k_cache, v_cache, plan, positions, softmax_scale, k_scales=None, v_scales=None, *, scratch
):  # fmt: skip
    """Rows that the plan does not cover come out as NaN, which no other row may see."""
    _launched("planned_attention", q, k_cache, positions, plan, scratch)
    num_streams, max_blocks = plan[:2].tolist()
    cu_seqlens = plan[2 : 3 + num_streams]
    tables = plan[3 + num_streams :][: num_streams * max_blocks].view(num_streams, max_blocks)
    rows = int(cu_seqlens[-1])
    out = torch.full_like(q, math.nan)
    out[:rows] = reference.paged_attention(
        q[:rows], k_cache, v_cache, tables, cu_seqlens, positions[:rows].long(), softmax_scale, k_scales, v_scales
    )  # fmt: skip
    return out


def guard_heads(x, final_norm, pre, inner_norm, response_head, query_head, eps):
    _launched("guard_heads", x)
    return reference.guard_heads(x, final_norm, pre, inner_norm, response_head, query_head, eps)


def guard_scores(
    x, label_index, num_labels, final_norm, pre, inner_norm, response_head, query_head, eps, sizes,
    *, out, workspace,
):  # fmt: skip
    _launched("guard_scores", x, label_index, num_labels, out)
    wanted = label_index[: int(num_labels)].long()
    logits = reference.guard_heads(x[wanted], final_norm, pre, inner_norm, response_head, query_head, eps)
    parts = logits.split(list(sizes), dim=-1)
    classes = [part.argmax(-1, keepdim=True).float() for part in parts]
    out[: len(wanted)] = torch.cat([logits, *(part.softmax(-1) for part in parts), *classes], dim=-1)
    return out


rope_table = reference.rope_table
quantize = reference.quantize


def default_config(operator, weight_shape, *, dtype, num_sms):
    return None


def allocate_workspace(configs, device, *, max_rows, others):
    def check(operator: str, weight: Tensor) -> None:
        assert (operator, tuple(weight.shape)) in configs

    return SimpleNamespace(check=check)


def guard_scores_scratch(num_rows, inner_size, sizes):
    return 1, 1


def attention_scratch(num_rows, num_heads, num_kv_heads, head_dim, device):
    return torch.zeros(num_rows, device=device)


def max_scratch_rows(num_rows, max_length):
    return num_rows * -(-max_length // 256)


def max_plan_size(num_rows, max_length, num_blocks, *, split):
    return 3 + num_rows + num_blocks


class TileRows(NamedTuple):
    tile_rows: int
    tall_rows: int


def has_wide_mma(device):
    return False


def attention_tile_rows(num_heads, num_kv_heads, head_dim, dtype, *, wide_mma):
    return TileRows(1, 4)


def plan_attention(cu_seqlens_q, positions, block_tables, *, block_size, tile_rows, tall_rows, split):
    header = [len(cu_seqlens_q) - 1, block_tables.shape[1]]
    return np.concatenate([header, cu_seqlens_q, block_tables.ravel()]).astype(np.int32)
