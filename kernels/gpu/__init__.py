"""The operators in Triton, for GPUs: backend "triton". The only folder that imports Triton.

Beside `reference`'s operators there are fused ones for steps of up to `SMALL_ROWS` rows, which launch six kernels a
layer. The same code runs without a GPU in Triton's interpreter, where TRITON_INTERPRET=1 is set before the import.
"""

from __future__ import annotations

from torch import Tensor

from guardengine.kernels import SMALL_ROWS as SMALL_ROWS
from guardengine.kernels.gpu.attention import WIDE_MMA as WIDE_MMA
from guardengine.kernels.gpu.attention import TileRows as TileRows
from guardengine.kernels.gpu.attention import attention_scratch as attention_scratch
from guardengine.kernels.gpu.attention import attention_tile_rows as attention_tile_rows
from guardengine.kernels.gpu.attention import has_wide_mma as has_wide_mma
from guardengine.kernels.gpu.attention import paged_attention as paged_attention
from guardengine.kernels.gpu.attention import planned_attention as planned_attention
from guardengine.kernels.gpu.heads import ClassifierSizes as ClassifierSizes
from guardengine.kernels.gpu.heads import guard_heads as guard_heads
from guardengine.kernels.gpu.heads import guard_scores as guard_scores
from guardengine.kernels.gpu.heads import guard_scores_scratch as guard_scores_scratch
from guardengine.kernels.gpu.linear import linear as linear
from guardengine.kernels.gpu.linear import linear_add as linear_add
from guardengine.kernels.gpu.linear import norm_gate_up as norm_gate_up
from guardengine.kernels.gpu.linear import norm_linear as norm_linear
from guardengine.kernels.gpu.linear_config import LinearConfig as LinearConfig
from guardengine.kernels.gpu.linear_config import default_config as default_config
from guardengine.kernels.gpu.plan import max_plan_size as max_plan_size
from guardengine.kernels.gpu.plan import max_scratch_rows as max_scratch_rows
from guardengine.kernels.gpu.plan import plan_attention as plan_attention
from guardengine.kernels.gpu.qkv import qk_norm_rope_store_kv as qk_norm_rope_store_kv
from guardengine.kernels.gpu.rows import fused_add_rms_norm as fused_add_rms_norm
from guardengine.kernels.gpu.rows import rms_norm as rms_norm
from guardengine.kernels.gpu.rows import silu_and_mul as silu_and_mul
from guardengine.kernels.gpu.tuning import measure_graph as measure_graph
from guardengine.kernels.gpu.tuning import tune as tune
from guardengine.kernels.gpu.workspace import Workspace as Workspace
from guardengine.kernels.gpu.workspace import allocate_workspace as allocate_workspace
from guardengine.kernels.quantization import QuantizedWeight
from guardengine.kernels.rope import rope_table as rope_table  # an operator, the same for all


def quantize(weight: Tensor, scheme: str) -> QuantizedWeight:
    """Refuse: this backend multiplies in the model's dtype only.  Raises ValueError."""
    raise ValueError(
        f"quantization={scheme!r}: the Triton backend has no quantized weights; load with quantization=None, or take "
        "backend='cpu'"
    )
