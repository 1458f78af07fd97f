"""The Triton operators against the reference, on any device: the size of the errors, and whether a row's bits depend
on the other rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from guardengine.kernels import reference

# Beside twice the plain reference's own error, relative to the largest number of the result.
_FLOORS = {torch.float32: 2e-5, torch.bfloat16: 2e-3, torch.float16: 3e-4}
_BLOCK_SIZE = 16
_EPS = 1e-6


class Shape(NamedTuple):
    """The widths of a model."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    guard: int


class Row(NamedTuple):
    """One operator at one number of rows."""

    operator: str
    dtype: str
    rows: int
    error: float  # largest, against the reference in float32
    limit: float
    same_bits: bool | None  # first row alone and in company; None where that is not promised
    is_ok: bool


def check_operators(
    ops: ModuleType, device: torch.device, shape: Shape, dtype: torch.dtype, rows: list[int], num_sms: int
) -> Iterator[Row]:
    """Check every operator at each number of rows. The reference's attention is torch's plain one: cuDNN's is not
    clean under compute-sanitizer's racecheck."""
    cases = _Cases(ops, device, shape, dtype, num_sms)
    for count in rows:
        for name, ours, theirs, is_invariant in cases.at(count):
            with sdpa_kernel(SDPBackend.MATH):
                exact, plain = theirs(torch.float32).float(), theirs(dtype).float()
            actual = ours(count).float()
            scale = max(float(exact.abs().max()), 1e-6)
            error = float((actual - exact).abs().max())
            limit = 2 * float((plain - exact).abs().max()) + _FLOORS[dtype] * scale
            same = bool(torch.equal(ours(1)[:1].float(), actual[:1])) if is_invariant else None
            finite = bool(actual.isfinite().all())
            is_ok = finite and error <= limit and same is not False
            yield Row(name, str(dtype).removeprefix("torch."), count, error, limit, same, is_ok)


Case = tuple[str, Callable[[int], Tensor], Callable[[torch.dtype], Tensor], bool]


class _Cases:
    """Inputs of one shape and dtype, and what to compute from them. `ours(n)` takes the first n rows only."""

    def __init__(
        self, ops: ModuleType, device: torch.device, shape: Shape, dtype: torch.dtype, num_sms: int
    ) -> None:
        self.ops, self.device, self.shape, self.dtype = ops, device, shape, dtype
        self.generator = torch.Generator().manual_seed(0)
        e, h, kv, d, f, g = shape
        self.weights = {
            "qkv": self.random((h + 2 * kv) * d, e, scale=e**-0.5),
            "o": self.random(e, h * d, scale=(h * d) ** -0.5),
            "gate_up": self.random(2 * f, e, scale=e**-0.5),
            "down": self.random(e, f, scale=f**-0.5),
            "pre": self.random(2 * g, e, scale=e**-0.5),
            "response": self.random(12, g, scale=g**-0.5),
            "query": self.random(11, g, scale=g**-0.5),
        }
        self.norm, self.head_norm = 1 + self.random(e, scale=0.1), 1 + self.random(d, scale=0.1)
        self.guard_norm = 1 + self.random(2, g, scale=0.1)
        self.sizes = ops.ClassifierSizes(3, 9, 3, 8)
        keys = (
            ("norm_linear", "qkv"),
            ("linear_add", "o"),
            ("norm_gate_up", "gate_up"),
            ("linear_add", "down"),
        )
        configs = {}
        for operator, name in keys:
            weight = self.weights[name]
            key = (operator, (weight.shape[0], weight.shape[1]))
            configs[key] = ops.default_config(*key, dtype=dtype, num_sms=num_sms)
        self.workspace = ops.allocate_workspace(
            configs, device, others=[ops.guard_scores_scratch(ops.SMALL_ROWS, g, self.sizes)]
        )

    def random(self, *size: int, scale: float = 1.0) -> Tensor:
        numbers = torch.randn(*size, generator=self.generator) * scale
        return numbers.to(self.dtype).to(self.device)

    def at(self, rows: int) -> Iterator[Case]:
        """The cases of one number of rows; fused ones only as far as they go."""
        yield from self._row_operators(rows)
        if rows <= self.ops.SMALL_ROWS:
            yield from self._fused(rows)
        yield self._heads(rows)
        yield from self._store_and_attend(rows)

    def _row_operators(self, rows: int) -> Iterator[Case]:
        ops, norm = self.ops, self.norm
        x, y = self.random(rows, self.shape.hidden), self.random(rows, self.shape.hidden)
        wide, qkv = self.random(rows, 2 * self.shape.inner), self.weights["qkv"]

        yield (
            "rms_norm", lambda n: ops.rms_norm(x[:n], norm, _EPS),
            lambda t: reference.rms_norm(x.to(t), norm.to(t), _EPS), True,
        )  # fmt: skip
        yield (
            "fused_add_rms_norm", lambda n: torch.cat(ops.fused_add_rms_norm(x[:n], y[:n], norm, _EPS), -1),
            lambda t: torch.cat(reference.fused_add_rms_norm(x.to(t), y.to(t), norm.to(t), _EPS), -1), True,
        )  # fmt: skip
        yield (
            "silu_and_mul", lambda n: ops.silu_and_mul(wide[:n]),
            lambda t: reference.silu_and_mul(wide.to(t)), True,
        )  # fmt: skip
        yield (
            "linear", lambda n: ops.linear(x[:n], qkv),
            lambda t: reference.linear(x.to(t), qkv.to(t)), rows <= ops.SMALL_ROWS,
        )  # fmt: skip

    def _fused(self, rows: int) -> Iterator[Case]:
        ops, norm, space = self.ops, self.norm, self.workspace
        e, f = self.shape.hidden, self.shape.inner
        qkv, gate_up = self.weights["qkv"], self.weights["gate_up"]
        x = self.random(rows, e)
        yield (
            "norm_linear", lambda n: ops.norm_linear(x[:n], norm, _EPS, qkv, workspace=space),
            lambda t: reference.linear(reference.rms_norm(x.to(t), norm.to(t), _EPS), qkv.to(t)), True,
        )  # fmt: skip
        yield (
            "norm_gate_up", lambda n: ops.norm_gate_up(x[:n], norm, _EPS, gate_up, workspace=space),
            lambda t: reference.silu_and_mul(
                reference.linear(reference.rms_norm(x.to(t), norm.to(t), _EPS), gate_up.to(t))
            ), True,
        )  # fmt: skip
        for name, width in (("o", self.shape.heads * self.shape.head_dim), ("down", f)):
            weight, inner, total = self.weights[name], self.random(rows, width), self.random(rows, e)
            yield self._added(weight, inner, total)

    def _added(self, weight: Tensor, inner: Tensor, total: Tensor) -> Case:
        ops, space = self.ops, self.workspace
        return (
            "linear_add", lambda n: ops.linear_add(inner[:n], weight, total[:n].clone(), workspace=space),
            lambda t: total.to(t) + reference.linear(inner.to(t), weight.to(t)), True,
        )  # fmt: skip

    def _heads(self, rows: int) -> Case:
        ops, weights, sizes = self.ops, self.weights, self.sizes
        x = self.random(rows, self.shape.hidden)
        tensors = (
            self.norm, weights["pre"], self.guard_norm, weights["response"], weights["query"],
        )  # fmt: skip

        def theirs(dtype: torch.dtype) -> Tensor:
            norm, pre, inner, response, query = (tensor.to(dtype) for tensor in tensors)
            logits = reference.guard_heads(x.to(dtype), norm, pre, inner, response, query, _EPS)
            return torch.cat([logits, *(part.softmax(-1) for part in logits.split(list(sizes), -1))], -1)

        def ours(n: int) -> Tensor:
            if rows > ops.SMALL_ROWS:
                logits = ops.guard_heads(x, *tensors, _EPS)
                return torch.cat([logits, *(part.softmax(-1) for part in logits.split(list(sizes), -1))], -1)
            out = torch.full((n, 2 * sum(sizes) + 4), torch.nan, device=self.device)
            index = torch.arange(n, dtype=torch.int32, device=self.device)
            count = torch.tensor([n], dtype=torch.int32, device=self.device)
            found: Tensor = ops.guard_scores(
                x, index, count, *tensors, _EPS, sizes, out=out, workspace=self.workspace
            )
            return found[:, : 2 * sum(sizes)]

        name = "guard_scores" if rows <= ops.SMALL_ROWS else "guard_heads"
        return name, ours, theirs, rows <= ops.SMALL_ROWS

    def _store_and_attend(self, rows: int) -> Iterator[Case]:
        """Streams of several lengths, the rows of a step at the end of each; with more rows than SMALL_ROWS one
        stream's prompt."""
        ops, (_, h, kv, d, _, _) = self.ops, self.shape
        batch = _batch(rows, rows <= ops.SMALL_ROWS, self.device)
        blocks = int(batch.tables.max()) + 1
        cache = self.random(2, blocks, _BLOCK_SIZE, kv, d)
        table = reference.rope_table(d, 1e6, int(batch.positions.max()) + 1).to(self.device)
        qkv, norm = self.random(rows, (h + 2 * kv) * d), self.head_norm

        def stored(backend: Any, dtype: torch.dtype, n: int) -> Tensor:
            keys, values = cache.to(dtype).clone()
            q = backend.qk_norm_rope_store_kv(
                qkv[:n].to(dtype), norm.to(dtype), norm.to(dtype), table, batch.positions[:n], batch.slots[:n],
                keys, values, _EPS,
            )  # fmt: skip
            kept = torch.cat([part.flatten(0, 1)[batch.slots[:n]].flatten(1) for part in (keys, values)], -1)
            return torch.cat([q.flatten(1), kept], -1)

        yield (
            "qk_norm_rope_store_kv", lambda n: stored(ops, self.dtype, n),
            lambda t: stored(reference, t, rows), True,
        )  # fmt: skip

        q = self.random(rows, h, d)

        def attended(backend: Any, dtype: torch.dtype, n: int) -> Tensor:
            keys, values = cache.to(dtype)
            bounds = batch.bounds.clamp(max=n)
            out: Tensor = backend.paged_attention(
                q[:n].to(dtype), keys, values, batch.tables, bounds, batch.positions[:n], d**-0.5
            )  # fmt: skip
            return out.flatten(1)

        yield (
            "paged_attention", lambda n: attended(ops, self.dtype, n),
            lambda t: attended(reference, t, rows), True,
        )  # fmt: skip


def _batch(rows: int, is_small: bool, device: torch.device) -> SimpleNamespace:
    """The places of rows: small steps have streams of 1 to 3 rows each after 5 to 700 tokens, large ones two
    prompts."""
    rng = np.random.default_rng(rows)
    counts: list[int] = []
    while sum(counts) < rows:
        counts.append(min(int(rng.integers(1, 4)) if is_small else -(-rows // 2), rows - sum(counts)))
    lengths = [max(count, int(rng.integers(5, 700)) if is_small else count) for count in counts]
    used = [-(-length // _BLOCK_SIZE) for length in lengths]
    order = rng.permutation(sum(used))
    tables = np.full((len(used), max(used)), -1, dtype=np.int32)
    for stream, count in enumerate(used):
        tables[stream, :count], order = order[:count], order[count:]
    positions = np.concatenate(
        [np.arange(length - count, length) for length, count in zip(lengths, counts, strict=True)]
    )
    owner = np.repeat(np.arange(len(counts)), counts)
    slots = tables[owner, positions // _BLOCK_SIZE].astype(np.int64) * _BLOCK_SIZE + positions % _BLOCK_SIZE
    return SimpleNamespace(
        tables=torch.from_numpy(tables).to(device),
        bounds=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)).to(device),
        positions=torch.from_numpy(positions).to(device),
        slots=torch.from_numpy(slots).to(device),
    )
