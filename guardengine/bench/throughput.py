"""Run an engine through one point of the workload, and measure it. Knows nothing of other implementations."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from guardengine.bench.floor import CostModel, Limits
from guardengine.bench.workload import Arrival, Point, poisson_arrivals
from guardengine.engine.engine import Engine
from guardengine.engine.stream import Stream
from guardengine.errors import IntegrityError
from guardengine.measuring import machine
from guardengine.measuring.random_ids import random_ids

# For each stream, after its prompt and before the clock runs, because kernels are chosen on first use.
WARM_UP_TOKENS = 2
Progress = Callable[[int], object]


def tokens_per_stream(point: Point) -> int:
    """The length of one stream at the end of this point."""
    return point.prompt_len + WARM_UP_TOKENS + point.response_len


@dataclass(slots=True)
class _Window:
    """The measurements while the clock runs."""

    engine: Engine
    cost: CostModel
    progress: Progress
    deadline: float
    is_cut_short: bool = False
    fed_at: dict[tuple[str, int], float] = field(default_factory=dict)  # (stream, position) -> clock
    steps_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    works: list[Any] = field(default_factory=list)
    longest_queue: int = 0

    def append(self, stream: Stream, ids: Sequence[int], at: float, position: int) -> None:
        stream.append(ids)
        for offset in range(len(ids)):
            self.fed_at[stream.stream_id, position + offset] = at

    def step(self) -> None:
        self.longest_queue = max(self.longest_queue, len(self.fed_at))
        start = time.perf_counter()
        labels = self.engine.step()
        end = time.perf_counter()
        self.steps_s.append(end - start)
        self.works.append(self.cost.of_labels(labels))
        for label in labels:
            fed_at = self.fed_at.pop((label.stream_id, label.position), None)
            if fed_at is None:
                raise IntegrityError(f"{label.stream_id}: a label came twice or unasked, at {label.position}")
            self.latencies_s.append(end - fed_at)
        if not labels:
            raise IntegrityError(f"{len(self.fed_at)} tokens were fed, and their labels did not come")
        self.progress(len(labels))

    def is_over(self) -> bool:
        """Whether no more tokens may be fed."""
        self.is_cut_short = self.is_cut_short or time.perf_counter() > self.deadline
        return self.is_cut_short


def measure_point(
    engine: Engine,
    point: Point,
    cost: CostModel,
    *,
    vocab_size: int,
    seed: int,
    progress: Progress,
    deadline: float = math.inf,
) -> dict[str, Any] | None:
    """Run one point.

    The window lasts from the arrival of the first response token to the last label. Before it prompts are computed,
    and WARM_UP_TOKENS are fed to every stream. Ceilings are probed before and after it.

    Args:
        engine: The engine.
        point: The workload.
        cost: Counts the least work of a step.
        vocab_size: Ids are drawn below this number.
        seed: Seed of ids and arrivals.
        progress: Called with numbers of tokens.
        deadline: A time of time.perf_counter() after which no more tokens are fed; the row then says that it was cut
            short.

    Returns:
        The row of the report; None when not even two rounds were done before the deadline.
    """
    ids = random_ids(point.num_streams, tokens_per_stream(point), vocab_size, seed)
    prompts = [row[: point.prompt_len] for row in ids]
    responses = [row[point.prompt_len + WARM_UP_TOKENS :] for row in ids]
    before = engine.stats()
    probes = [machine.probe_ceilings(before["num_threads"])]
    streams: list[Stream] = []
    try:
        start = time.perf_counter()
        streams += [engine.open(token_ids=prompt, role="user") for prompt in prompts]
        while any(stream.num_pending_tokens for stream in streams):
            computed = engine.stats()["tokens_computed"]
            engine.step()
            progress(engine.stats()["tokens_computed"] - computed)
            if time.perf_counter() > deadline:
                return None
        prefill_s = time.perf_counter() - start
        num_prefill_steps = engine.stats()["steps"] - before["steps"]
        for stream, row in zip(streams, ids, strict=True):
            stream.append(row[point.prompt_len : point.prompt_len + WARM_UP_TOKENS])
        progress(len(engine.run()))

        window = _Window(engine, cost, progress, deadline)
        start = time.perf_counter()
        if point.arrival == "lockstep":
            _run_lockstep(window, point, streams, responses)
        else:
            _run_poisson(window, point, streams, responses, poisson_arrivals(point, seed))
        window_s = time.perf_counter() - start
        stats = engine.stats()
    finally:
        for stream in streams:
            stream.close()
    num_tokens = len(window.latencies_s)
    if num_tokens < 2 * point.k * point.num_streams and window.is_cut_short:
        return None
    probes.append(machine.probe_ceilings(before["num_threads"]))
    limits = Limits.best_of(probes, before["dtype"], before["quantization"])
    floors = [limits.seconds(work) for work in window.works]
    prefill_floor_s, prefill_bound = limits.seconds(
        cost.of_prompts(point.num_streams, point.prompt_len, num_prefill_steps)
    )
    blocks_used = stats["kv_blocks_total"] - stats["kv_blocks_free"]
    block_bytes = stats["kv_cache_bytes"] // stats["kv_blocks_total"]
    return {
        **asdict(point),
        "rate": point.rate if point.arrival == "poisson" else None,
        "is_cut_short": window.is_cut_short,
        "num_tokens": num_tokens,
        "context_len": tokens_per_stream(point) - point.response_len,
        "tokens_per_s": num_tokens / window_s,
        "window_s": window_s,
        "num_steps": len(window.steps_s),
        "tokens_per_step": num_tokens / len(window.steps_s),
        "longest_queue": window.longest_queue,
        "step_ms": percentiles_ms(window.steps_s),
        "label_latency_ms": percentiles_ms(window.latencies_s),
        "prefill_tokens_per_s": point.num_streams * point.prompt_len / prefill_s,
        "prefill_s": prefill_s,
        "prefill_steps": num_prefill_steps,
        "kv_used_bytes": blocks_used * block_bytes,
        "kv_used_share": blocks_used / stats["kv_blocks_total"],
        "ceilings": asdict(limits),
        "step_bytes": sum(work.num_bytes for work in window.works) / len(window.works),
        "step_flops": sum(work.flops for work in window.works) / len(window.works),
        "floor_step_ms": 1e3 * sum(floor for floor, _ in floors) / len(floors),
        "floor_bound": Counter(bound for _, bound in floors).most_common(1)[0][0],
        "share_of_floor": sum(floor for floor, _ in floors) / sum(window.steps_s),
        "prefill_floor_bound": prefill_bound,
        "prefill_share_of_floor": prefill_floor_s / prefill_s,
    }


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds."""
    return {f"p{p}": float(np.percentile(seconds, p)) * 1e3 for p in (50, 90, 99)}


def _run_lockstep(
    window: _Window, point: Point, streams: Sequence[Stream], responses: Sequence[Sequence[int]]
) -> None:
    for first in range(0, point.response_len, point.k):
        if window.is_over():
            break
        position = point.prompt_len + WARM_UP_TOKENS + first
        for stream, response in zip(streams, responses, strict=True):
            window.append(stream, response[first : first + point.k], time.perf_counter(), position)
        while window.fed_at:
            window.step()


def _run_poisson(
    window: _Window,
    point: Point,
    streams: Sequence[Stream],
    responses: Sequence[Sequence[int]],
    arrivals: Sequence[Arrival],
) -> None:
    """Latency counts from when tokens were due, so it includes the wait for a running step."""
    start = time.perf_counter()
    offset = point.prompt_len + WARM_UP_TOKENS
    upcoming = 0
    while upcoming < len(arrivals) or window.fed_at:
        if upcoming < len(arrivals) and window.is_over():
            upcoming = len(arrivals)
        now = time.perf_counter() - start
        while upcoming < len(arrivals) and arrivals[upcoming].due_s <= now:
            due_s, index, first, count = arrivals[upcoming]
            ids = responses[index][first : first + count]
            window.append(streams[index], ids, start + due_s, offset + first)
            upcoming += 1
        if window.fed_at:
            window.step()
        elif upcoming < len(arrivals):
            time.sleep(max(0.0, arrivals[upcoming].due_s - (time.perf_counter() - start)))
