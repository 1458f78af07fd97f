"""Counts the bytes and multiplications of one step of the triton backend, launch by launch, from the kernels' own
configurations and plans. Measures nothing and needs no GPU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from guardengine.bench.gpu.devices import GPU
from guardengine.checkpoint.model_config import ModelConfig
from guardengine.kernels import SMALL_ROWS
from guardengine.kernels import gpu as operators
from guardengine.kernels.gpu import linear_config as products
from guardengine.kernels.gpu import plan as plans
from guardengine.runners.step_inputs import Words, buckets, places


class Launch(NamedTuple):
    """The work of one kernel. Everything that a kernel must read or write once counts for memory, also data that an
    earlier kernel of the step has just written and that may still be in L2. Data that it reads again counts for L2,
    and so do the partial sums of a product whose whole launch, weights included, fits there: they are read within
    microseconds."""

    name: str
    memory_bytes: float
    l2_bytes: float
    flops: float


class Shape(NamedTuple):
    """The shape of a step: `streams` streams, each with `k` new tokens after `context` tokens."""

    streams: int
    k: int
    context: int

    @property
    def rows(self) -> int:
        return self.streams * self.k


class Step(NamedTuple):
    """All launches of a step: those that occur once, and those of each layer."""

    outside: tuple[Launch, ...]
    layer: tuple[Launch, ...]
    num_layers: int
    words: int  # of the upload

    @property
    def launches(self) -> tuple[Launch, ...]:
        return self.outside + self.layer * self.num_layers

    @property
    def memory_bytes(self) -> float:
        return sum(launch.memory_bytes for launch in self.launches) + 4 * self.words

    @property
    def l2_bytes(self) -> float:
        return sum(launch.l2_bytes for launch in self.launches)


class Counter:
    """Counts one model's steps on a GPU, with the kernels' default configurations."""

    def __init__(
        self, config: ModelConfig, dtype: str, kv_dtype: str, gpu: GPU, block_size: int = 16
    ) -> None:
        self.config, self.gpu, self.block_size = config, gpu, block_size
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.item = self.dtype.itemsize
        self.has_scales = kv_dtype == "int8"
        self.kv_item = 1 if self.has_scales else self.item
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = ((heads + 2 * kv_heads) * dim, config.hidden_size)
        self.o = (config.hidden_size, heads * dim)
        self.gate_up = (2 * config.intermediate_size, config.hidden_size)
        self.down = (config.hidden_size, config.intermediate_size)

    def step(self, shape: Shape) -> Step:
        """All launches of a step: fused kernels up to SMALL_ROWS rows; above it the products of cuBLAS and the other
        kernels."""
        return self._small(shape) if shape.rows <= SMALL_ROWS else self._large(shape)

    def _small(self, shape: Shape) -> Step:
        rows, width = buckets(shape.rows)[-1], self.config.hidden_size * self.item
        plan = self._plan(shape, split=True)
        layer = (
            self._linear(products.NORMED, rows, self.qkv),
            self._store(rows),
            self._attention(shape, plan),
            self._linear(products.SUMMED, rows, self.o),
            self._linear(products.GATED, rows, self.gate_up),
            self._linear(products.SUMMED, rows, self.down),
        )
        outside = (
            Launch("embedding", 2 * rows * width, 0, 0),
            self._heads("guard_scores", shape.rows),
        )
        return Step(outside, layer, self.config.num_layers, places(rows)[-1] + len(plan))

    def _large(self, shape: Shape) -> Step:
        rows, width = buckets(shape.rows)[-1], self.config.hidden_size * self.item
        plan = self._plan(shape, split=False)
        inner = self.config.intermediate_size * self.item
        layer = (
            Launch("fused_add_rms_norm", 4 * rows * width, 0, 0),
            self._product(rows, self.qkv),
            self._store(rows),
            self._attention(shape, plan),
            Launch("paged_attention, of the other tiles", 0, 0, 0),
            self._product(rows, self.o),
            Launch("fused_add_rms_norm", 4 * rows * width, 0, 0),
            self._product(rows, self.gate_up),
            Launch("silu_and_mul", 3 * rows * inner, 0, 0),
            self._product(rows, self.down),
        )
        outside = (
            Launch("embedding", 2 * rows * width, 0, 0),
            self._heads("guard_scores", shape.rows),
        )
        return Step(outside, layer, self.config.num_layers, places(rows)[-1] + len(plan))

    def _linear(self, operator: str, rows: int, weight: tuple[int, int]) -> Launch:
        chosen = products.default_config(operator, weight, dtype=self.dtype, num_sms=self.gpu.num_sms)
        columns, inner = products.num_columns(operator, weight), weight[1]
        tile_rows = chosen.row_tile(rows)
        tiles_m, tiles_n = -(-rows // tile_rows), -(-columns // chosen.block_n)
        weights, x = weight[0] * inner * self.item, rows * inner * self.item
        out = rows * columns * self.item * (2 if operator == products.SUMMED else 1)
        # Parts of sums are stored for rows that exist, and read once.
        parts = chosen.scratch(operator, columns, rows)[0] * 4 * rows / (tiles_m * tile_rows)
        once, again = weights + x + out, (tiles_m - 1) * weights + (tiles_n - 1) * x
        if once + parts > self.gpu.l2_bytes:
            once += 2 * parts
        else:
            again += 2 * parts
        return Launch(
            operator,
            once,
            again,
            2.0 * tiles_m * tile_rows * weight[0] * inner,
        )

    def _product(self, rows: int, weight: tuple[int, int]) -> Launch:
        """A product of torch. How often its tiles read data again is unknown, and not counted."""
        numbers = weight[0] * weight[1] + rows * (weight[0] + weight[1])
        return Launch("linear", numbers * self.item, 0, 2.0 * rows * weight[0] * weight[1])

    def _store(self, rows: int) -> Launch:
        config = self.config
        stored = 2 * config.num_kv_heads * (config.head_dim * self.kv_item + (4 if self.has_scales else 0))
        qkv = self.qkv[0] * self.item + config.num_heads * config.head_dim * self.item
        return Launch("qk_norm_rope_store_kv", rows * (qkv + stored + 4 * config.head_dim), 0, 0)

    def _plan(self, shape: Shape, *, split: bool) -> Words:
        blocks = -(-shape.context // self.block_size)
        positions = np.tile(np.arange(shape.context - shape.k, shape.context), shape.streams)
        plan: Words = operators.plan_attention(
            np.arange(shape.streams + 1) * shape.k,
            positions,
            np.arange(shape.streams * blocks).reshape(shape.streams, blocks),
            block_size=self.block_size,
            split=split,
            **self._tile_rows()._asdict(),
        )
        return plan

    def _tile_rows(self) -> operators.TileRows:
        config = self.config
        return operators.attention_tile_rows(
            config.num_heads, config.num_kv_heads, config.head_dim, self.dtype,
            wide_mma=self.gpu.capability[0] in operators.WIDE_MMA,
        )  # fmt: skip

    def _attention(self, shape: Shape, plan: Words) -> Launch:
        config = self.config
        num_tall = int(plan[plans.NUM_TALL_ITEMS])
        count = int(plan[plans.NUM_ITEMS]) + num_tall
        items = plan[plans.HEADER_SIZE : plans.HEADER_SIZE + count * plans.ITEM_FIELDS].reshape(count, -1)
        keys = int((items[:, plans.END_KEY] - items[:, plans.FIRST_KEY]).sum())
        token = 2 * config.num_kv_heads * (config.head_dim * self.kv_item + (4 if self.has_scales else 0))
        once = shape.streams * shape.context
        waiting = int(plan[plans.NUM_SCRATCH_ROWS]) * config.num_heads * (config.head_dim + 2) * 4
        q_and_out = 2 * shape.rows * config.num_heads * config.head_dim * self.item
        tile_rows, tall_rows = self._tile_rows()
        tile = (tall_rows if num_tall else tile_rows) * config.num_heads  # streams are alike
        return Launch(
            "paged_attention",
            once * token + q_and_out + 2 * waiting + 4 * len(plan),
            (keys - once) * token,
            4.0 * keys * tile * config.head_dim,
        )

    def _heads(self, name: str, rows: int) -> Launch:
        config, heads = self.config, self.config.heads
        if heads is None:
            return Launch(name, 0, 0, 0)
        numbers = heads.inner_size * (2 * config.hidden_size + heads.num_logits)
        return Launch(
            name, numbers * self.item + rows * config.hidden_size * self.item, 0, 2.0 * rows * numbers
        )
