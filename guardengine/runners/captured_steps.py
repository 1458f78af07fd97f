"""CapturedSteps: the model as graphs, one for each bucket of rows, captured once.

A graph's kernels read everything that changes from one step to the next (ids, slots, labels, attention's plan) from
one buffer on the device, at places that never change; so a replay is one call, whatever the streams in it. Up to
SMALL_ROWS rows it is of fused operators, above of cuBLAS' products with the others between them.
"""

from __future__ import annotations

import functools
import logging
import time
from bisect import bisect_left

import torch
from torch import Tensor

from guardengine.checkpoint.model_config import ModelConfig
from guardengine.errors import ConfigError
from guardengine.kernels import SMALL_ROWS
from guardengine.runners.accelerator import Accelerator, Graph
from guardengine.runners.batch import Batch
from guardengine.runners.model import FusedModel, StepBuffers, fused_forward, scored_forward
from guardengine.runners.operators import FusedOperators
from guardengine.runners.step_inputs import NO_SLOT, StepInputs, Words, buckets, places
from guardengine.runners.tuned import matrix_configs

_CLASSES = 4  # columns after logits and probabilities: what the classifiers chose

logger = logging.getLogger("guardengine")


class CapturedSteps:
    """Owns the buffers that captured steps read and write.

    Args:
        model: On the accelerator's device.
        accelerator: Captures and replays.
        max_rows: Rows of a step at most.
        max_length: Tokens of a stream at most.

    Raises:
        ConfigError: A step cannot be captured.
    """

    def __init__(self, model: FusedModel, accelerator: Accelerator, max_rows: int, max_length: int) -> None:
        ops, config = model.ops, model.config
        self._ops = ops
        self._tile_rows = ops.attention_tile_rows(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            model.weights.embed.dtype,
            wide_mma=ops.has_wide_mma(accelerator.device),
        )
        self._block_size = model.kv_cache.block_size
        self.buckets = buckets(max_rows)
        self.num_words = num_words(ops, self.buckets, max_length, self._block_size)
        self.words = accelerator.empty((self.num_words,), torch.int32)
        sizes = ops.ClassifierSizes(*class_sizes(config))
        self.scores = accelerator.empty((self.buckets[-1], 2 * sum(sizes) + _CLASSES), torch.float32)
        self._buffers = StepBuffers(
            ops.allocate_workspace(
                matrix_configs(ops, model.weights, accelerator),
                accelerator.device,
                max_rows=SMALL_ROWS,
                others=[ops.guard_scores_scratch(self.buckets[-1], model.heads.norm.shape[1], sizes)],
            ),
            ops.attention_scratch(
                ops.max_scratch_rows(SMALL_ROWS, max_length),
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                accelerator.device,
            ),
            sizes,
            self.scores,
        )
        self._graphs: dict[int, Graph] = {}
        started = time.perf_counter()
        for rows in reversed(self.buckets):  # the largest first: the others find its memory
            run = fused_forward if rows <= SMALL_ROWS else scored_forward
            step = functools.partial(run, model, self._empty_step(rows), self._buffers)
            try:
                self._graphs[rows] = accelerator.capture(step)
            except Exception as error:
                raise ConfigError(
                    f"the step of {rows} rows could not be captured on {accelerator.device}: {error}. Free the GPU's "
                    "memory and check that the driver is current (nvidia-smi); backend='reference' runs without "
                    "captured steps"
                ) from error
        logger.info("captured %d steps in %.1f s", len(self.buckets), time.perf_counter() - started)

    def bucket(self, num_rows: int) -> int:
        """The rows of the graph that a step of `num_rows` rows runs on."""
        return self.buckets[bisect_left(self.buckets, num_rows)]

    def plan(self, batch: Batch) -> Words:
        """Attention's plan of a batch: split over segments of keys in small steps, where rows are few."""
        split = len(batch.input_ids) <= SMALL_ROWS
        return self._ops.plan_attention(
            batch.rows.cu_seqlens_q.numpy(),
            batch.rows.positions.numpy(),
            batch.block_tables.numpy(),
            block_size=self._block_size,
            split=split,
            **self._tile_rows._asdict(),
        )

    def replay(self, num_rows: int) -> Tensor:
        """Queue the step of `num_rows` rows, a bucket, whose words were uploaded; returns where its scores will be."""
        self._graphs[num_rows].replay()
        return self.scores

    def _empty_step(self, num_rows: int) -> StepInputs:
        """A bucket's places, holding a step for what runs as it is captured: no item, no label, nothing stored."""
        self.words.zero_()
        inputs = StepInputs.of(self.words, num_rows)
        inputs.slot_mapping.fill_(NO_SLOT)
        return inputs


def num_words(ops: FusedOperators, all_buckets: tuple[int, ...], max_length: int, block_size: int) -> int:
    """Words that a step of any of these buckets can need."""
    sizes = [
        places(rows)[-1]
        + ops.max_plan_size(rows, max_length, rows * -(-max_length // block_size), split=rows <= SMALL_ROWS)
        for rows in all_buckets
    ]
    return max(sizes)


def class_sizes(config: ModelConfig) -> list[int]:
    """Columns of each classifier, in the order of the logits."""
    heads = config.heads
    if heads is None:
        return []
    names = (heads.response_risks, heads.response_categories, heads.query_risks, heads.query_categories)
    return list(map(len, names))
