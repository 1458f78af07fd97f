"""Choosing how each weight is multiplied by measuring: once at load, one choice for every number of rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from guardengine.kernels.gpu.attention import has_wide_mma
from guardengine.kernels.gpu.linear import linear_add, norm_gate_up, norm_linear
from guardengine.kernels.gpu.linear_config import GATED, NORMED, SUMMED, LinearConfig, candidates, num_columns
from guardengine.kernels.gpu.workspace import Workspace, allocate_workspace


def tune(
    operator: str,
    weight_shape: tuple[int, int],
    dtype: torch.dtype,
    rows: Sequence[int],
    measure: Callable[[Callable[[], None]], float],
    *,
    device: torch.device | str,
    num_sms: int,
    cache_bytes: int = 2**28,
) -> LinearConfig:
    """Choose the candidate that takes the least time.

    In a step no weight is read twice, so copies of the weight, more than `cache_bytes` together, take turns.

    Args:
        operator: "norm_linear", "norm_gate_up" or "linear_add".
        weight_shape: (out, in) of the weight.
        dtype: Its dtype.
        rows: Numbers of rows, whose times are added.
        measure: Runs what it is given and returns how many seconds that took: `measure_graph` on a GPU.
        device: The GPU.
        num_sms: Its multiprocessors.
        cache_bytes: More than its second-level cache.

    Raises:
        ValueError: For another operator.
    """
    if operator not in (NORMED, GATED, SUMMED):
        raise ValueError(f"operator={operator!r}: choose {NORMED}, {GATED} or {SUMMED}")
    inner, columns = weight_shape[1], num_columns(operator, weight_shape)
    num_copies = 1 + cache_bytes // (weight_shape[0] * inner * dtype.itemsize)
    weights = torch.randn(num_copies, *weight_shape, dtype=dtype, device=device)
    norm = torch.ones(inner, dtype=dtype, device=device)

    def seconds(config: LinearConfig) -> float:
        workspace = allocate_workspace({(operator, weight_shape): config}, device, max_rows=max(rows))
        return sum(
            measure(_trial(operator, num_rows, weights, norm, columns, workspace)) for num_rows in rows
        )

    wide_mma = dtype != torch.float32 and has_wide_mma(torch.device(device))
    return min(
        candidates(operator, weight_shape, dtype=dtype, num_sms=num_sms, wide_mma=wide_mma), key=seconds
    )


def _trial(
    operator: str,
    num_rows: int,
    weights: torch.Tensor,
    norm: torch.Tensor,
    columns: int,
    workspace: Workspace,
) -> Callable[[], None]:
    """A call that multiplies as many rows with each weight in turn."""
    x = torch.randn(num_rows, len(norm), dtype=norm.dtype, device=norm.device)
    out = torch.zeros(num_rows, columns, dtype=norm.dtype, device=norm.device)

    def run() -> None:
        for weight in weights:
            if operator == NORMED:
                norm_linear(x, norm, 1e-6, weight, out=out, workspace=workspace)
            elif operator == GATED:
                norm_gate_up(x, norm, 1e-6, weight, out=out, workspace=workspace)
            else:
                linear_add(x, weight, out, workspace=workspace)

    return run


def measure_graph(run: Callable[[], None]) -> float:
    """Seconds that the launches of `run` take on the current GPU, captured in a graph: the median of ten replays.

    Launched from Python they would take as long as Python does, whatever the kernel.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times: list[float] = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)
