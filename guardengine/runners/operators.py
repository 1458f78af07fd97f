"""Operators, FusedOperators: what runners call in a backend. A backend is a module of guardengine.kernels.

Formulas, shapes and dtypes are written down once, in kernels/reference.py and, of the fused ones, in kernels/gpu. A
weight matrix is a tensor or what the backend's own `quantize` made of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.integer[Any]]


class Operators(Protocol):
    """What every backend has."""

    __name__: str

    def linear(self, x: Tensor, weight: Any) -> Tensor: ...

    def quantize(self, weight: Tensor, scheme: str) -> Any: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def fused_add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]: ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor: ...

    def rope_table(self, head_dim: int, theta: float, num_positions: int) -> Tensor: ...

    def qk_norm_rope_store_kv(
        self,
        qkv: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        cos_sin: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        eps: float,
        k_scales: Tensor | None = None,
        v_scales: Tensor | None = None,
    ) -> Tensor: ...

    def paged_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        cu_seqlens_q: Tensor,
        positions: Tensor,
        softmax_scale: float,
        k_scales: Tensor | None = None,
        v_scales: Tensor | None = None,
    ) -> Tensor: ...

    def guard_heads(
        self,
        x: Tensor,
        final_norm: Tensor,
        pre: Tensor,
        inner_norm: Tensor,
        response_head: Tensor,
        query_head: Tensor,
        eps: float,
    ) -> Tensor: ...


class TileRows(Protocol):
    """Rows of one stream that a program of attention computes, by name of `plan_attention`'s parameter."""

    def _asdict(self) -> dict[str, int]: ...


class FusedOperators(Operators, Protocol):
    """What a backend has that runs steps of up to SMALL_ROWS rows in few launches.

    Types that are `Any` are the backend's own: a workspace, attention's scratch, a configuration of a product.
    """

    ClassifierSizes: type[Any]  # of the number of classes of each classifier
    LinearConfig: type[Any]  # a dataclass of integers: how one weight matrix is multiplied

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Any, *, workspace: Any) -> Tensor: ...

    def norm_gate_up(self, x: Tensor, norm: Tensor, eps: float, weight: Any, *, workspace: Any) -> Tensor: ...

    def linear_add(self, x: Tensor, weight: Any, residual: Tensor, *, workspace: Any) -> Tensor: ...

    def plan_attention(
        self,
        cu_seqlens_q: Array,
        positions: Array,
        block_tables: Array,
        *,
        block_size: int,
        tile_rows: int,
        tall_rows: int = 0,
        split: bool,
    ) -> npt.NDArray[np.int32]: ...

    def max_plan_size(self, num_rows: int, max_length: int, num_blocks: int, *, split: bool) -> int: ...

    def planned_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: Tensor,
        positions: Tensor,
        softmax_scale: float,
        k_scales: Tensor | None = None,
        v_scales: Tensor | None = None,
        *,
        scratch: Any,
    ) -> Tensor: ...

    def has_wide_mma(self, device: torch.device) -> bool: ...

    def attention_tile_rows(
        self, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, *, wide_mma: bool
    ) -> TileRows: ...

    def max_scratch_rows(self, num_rows: int, max_length: int) -> int: ...

    def attention_scratch(
        self, num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> Any: ...

    def guard_scores(
        self,
        x: Tensor,
        label_index: Tensor,
        num_labels: Tensor,
        final_norm: Tensor,
        pre: Tensor,
        inner_norm: Tensor,
        response_head: Tensor,
        query_head: Tensor,
        eps: float,
        sizes: Any,
        *,
        out: Tensor,
        workspace: Any,
    ) -> Tensor: ...

    def guard_scores_scratch(self, num_rows: int, inner_size: int, sizes: Any) -> tuple[int, int]: ...

    def allocate_workspace(
        self,
        configs: Mapping[tuple[str, tuple[int, int]], Any],
        device: torch.device | str,
        *,
        max_rows: int = ...,
        others: Iterable[tuple[int, int]] = (),
    ) -> Any: ...

    def default_config(
        self, operator: str, weight_shape: tuple[int, ...], *, dtype: torch.dtype, num_sms: int
    ) -> Any: ...

    def tune(
        self,
        operator: str,
        weight_shape: tuple[int, int],
        dtype: torch.dtype,
        rows: Sequence[int],
        measure: Callable[[Callable[[], None]], float],
        *,
        device: torch.device | str,
        num_sms: int,
    ) -> Any: ...

    def measure_graph(self, run: Callable[[], None]) -> float: ...
