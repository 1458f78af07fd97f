"""SmallSteps: the model over up to 64 rows as graphs, one for each bucket of rows, captured once.

A graph's kernels read everything that changes from one step to the next (ids, slots, labels, attention's plan) from
one buffer on the device, at places that never change; so a replay is one call, whatever the streams in it.
"""

from __future__ import annotations

import functools
import logging
import time
from types import ModuleType

import torch
from torch import Tensor

from guardengine.accelerator import Accelerator, Graph
from guardengine.batch import Batch, Rows
from guardengine.config import ModelConfig
from guardengine.errors import ConfigError
from guardengine.model import StepScratch, fused_forward
from guardengine.step_inputs import BUCKETS, NO_SLOT, PLAN, SMALL_ROWS, SmallStep, Words, bucket
from guardengine.tuned import matrix_configs
from guardengine.weights import HeadWeights, Weights

_CLASSES = 4  # columns after logits and probabilities: what the classifiers chose

logger = logging.getLogger("guardengine")


class SmallSteps:
    """Owns the buffers that captured steps read and write. Raises ConfigError where capturing fails."""

    def __init__(
        self,
        ops: ModuleType,
        config: ModelConfig,
        weights: Weights,
        heads: HeadWeights,
        cos_sin: Tensor,
        kv_cache: Tensor,
        kv_scales: Tensor | None,
        accelerator: Accelerator,
        max_length: int,
        *,
        use_pdl: bool = False,
    ) -> None:
        self._ops, self._config = ops, config
        self._block_size = kv_cache.shape[3]
        self.num_words = num_words(ops, max_length, self._block_size)
        self.words = accelerator.empty((self.num_words,), torch.int32)
        self._reset_words()
        self._sizes = ops.ClassifierSizes(*class_sizes(config))
        self.scores = accelerator.empty((SMALL_ROWS, 2 * sum(self._sizes) + _CLASSES), torch.float32)
        self._scratch = self._allocate_scratch(weights, heads, accelerator, max_length, use_pdl)
        self._graphs: dict[int, Graph] = {}
        started = time.perf_counter()
        for rows in reversed(BUCKETS):  # the largest first: the others find its memory
            step = functools.partial(
                fused_forward,
                ops,
                config,
                weights,
                heads,
                cos_sin,
                kv_cache,
                kv_scales,
                SmallStep.of(self.words, rows),
                self._scratch,
                self._sizes,
                self.scores,
            )
            try:
                self._graphs[rows] = accelerator.capture(step)
            except Exception as error:
                raise ConfigError(
                    f"the step of {rows} rows could not be captured on {accelerator.device}: {error}. Free the GPU's "
                    "memory and check that the driver is current (nvidia-smi); backend='reference' runs without "
                    "captured steps"
                ) from error
        logger.info("captured %d steps in %.1f s", len(BUCKETS), time.perf_counter() - started)

    def plan(self, batch: Batch) -> Words:
        """Attention's plan of a batch of up to SMALL_ROWS rows."""
        return make_plan(self._ops, self._config, batch, batch.rows, self._block_size, split=True)

    def replay(self, num_rows: int) -> Tensor:
        """Queue the step whose words were uploaded; returns where its scores will be."""
        self._graphs[bucket(num_rows)].replay()
        return self.scores

    def _allocate_scratch(
        self,
        weights: Weights,
        heads: HeadWeights,
        accelerator: Accelerator,
        max_length: int,
        use_pdl: bool,
    ) -> StepScratch:
        ops, config = self._ops, self._config
        return StepScratch(
            ops.allocate_workspace(
                matrix_configs(ops, weights, accelerator, use_pdl=use_pdl),
                accelerator.device,
                max_rows=SMALL_ROWS,
                others=[ops.guard_scores_scratch(SMALL_ROWS, heads.norm.shape[1], self._sizes)],
                use_pdl=use_pdl,
            ),
            ops.attention_scratch(
                ops.max_scratch_rows(SMALL_ROWS, max_length),
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                accelerator.device,
            ),
        )

    def _reset_words(self) -> None:
        """An empty step, for what runs before the first: no item, no label, nothing stored."""
        self.words.zero_()
        step = SmallStep.of(self.words, SMALL_ROWS)
        step.slot_mapping.fill_(NO_SLOT)


def num_words(ops: ModuleType, max_length: int, block_size: int) -> int:
    """Words that a step of up to SMALL_ROWS rows can need."""
    size: int = ops.max_plan_size(SMALL_ROWS, max_length, SMALL_ROWS * -(-max_length // block_size))
    return PLAN + size


def class_sizes(config: ModelConfig) -> list[int]:
    """Columns of each classifier, in the order of the logits."""
    heads = config.heads
    if heads is None:
        return []
    names = (heads.response_risks, heads.response_categories, heads.query_risks, heads.query_categories)
    return list(map(len, names))


def make_plan(
    ops: ModuleType, config: ModelConfig, batch: Batch, rows: Rows, block_size: int, *, split: bool
) -> Words:
    """Attention's plan of a batch's rows, as the backend's attention reads it."""
    plan: Words = ops.plan_attention(
        rows.cu_seqlens_q.numpy(),
        rows.positions.numpy(),
        batch.block_tables.numpy(),
        block_size=block_size,
        tile_rows=ops.attention_tile_rows(config.num_heads, config.num_kv_heads, split=split),
        split=split,
    )
    return plan
