"""Metrics for Prometheus. They have the names of vLLM's metrics where there are such, after `guardengine:`.

The counters of the engine are read from its stats when Prometheus asks; everything that only the server sees is
counted here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from guardengine.engine.async_engine import AsyncEngine
from guardengine.labels import Role, Verdict

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKENS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_STATS_TIMEOUT_S = 1.0

# Metrics from the engine's stats: name, description, entry of the stats.
_GAUGES = (
    ("sessions_active", "Streams open in the engine.", "streams_open"),
    ("num_requests_waiting", "Appends that wait for room.", "appends_waiting"),
    ("num_tokens_pending", "Tokens accepted and not computed yet.", "tokens_pending"),
    ("lag_seconds", "How long the oldest pending tokens have waited for their labels.", "lag_s"),
)
_COUNTERS = (
    ("prefix_cache_queries", "Tokens looked up in the prefix cache.", "prefix_tokens_queried"),
    ("prefix_cache_hits", "Tokens found in the prefix cache.", "prefix_tokens_hit"),
    ("num_preemptions", "Idle streams that lost their KV blocks to others.", "preemptions"),
    ("kv_blocks_evicted", "Cached KV blocks that were evicted.", "kv_blocks_evicted"),
)


class Metrics:
    """The counters of one server.

    Attributes:
        registry: The registry of prometheus_client; others may add their own metrics to it.
    """

    def __init__(self, engines: Mapping[str, AsyncEngine]) -> None:
        self.registry = registry = CollectorRegistry()
        self._engines = _Engines(engines)
        registry.register(self._engines)

        def name(stem: str) -> str:
            return f"guardengine:{stem}"

        self.http_requests = Counter(
            name("http_requests"), "Answers by path and status.", ("path", "status"), registry=registry
        )
        self.request_success = Counter(
            name("request_success"), "Conversations judged, and how.", ("finished_reason",), registry=registry
        )
        self.requests_running = Gauge(
            name("num_requests_running"), "HTTP requests under way.", registry=registry
        )
        self.latency = Histogram(
            name("e2e_request_latency_seconds"),
            "From a request's headers to the end of its answer.",
            ("path",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_label = Histogram(
            name("time_to_first_token_seconds"),
            "From opening a stream to the label of its prompt.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.chunk_latency = Histogram(
            name("chunk_latency_seconds"),
            "From taking an append off a stream's queue to its labels.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.inter_token = Histogram(
            name("inter_token_latency_seconds"),
            "The chunk latency divided by the number of labels.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            name("prompt_tokens"), "Tokens of prompts, the template's included.", registry=registry
        )
        self.generation_tokens = Counter(
            name("generation_tokens"), "Tokens of replies that were labelled.", registry=registry
        )
        self.verdicts = Counter(
            name("verdicts"),
            "Verdicts by action, risk, category and the role whose text decided; an escalation counts again.",
            ("action", "risk", "category", "role"),
            registry=registry,
        )
        self.detection_lag = Histogram(
            name("detection_lag_tokens"),
            "Tokens of a reply that had arrived after the deciding token when the verdict was sent.",
            buckets=_TOKENS,
            registry=registry,
        )
        self.connections = Gauge(name("websocket_connections"), "WebSockets open.", registry=registry)
        self.streams = Gauge(name("websocket_streams"), "Streams open on WebSockets.", registry=registry)
        self.refused = Counter(
            name("requests_refused"),
            "Requests and operations refused, by code.",
            ("code",),
            registry=registry,
        )
        for finished_reason in ("stop", "abort"):  # so that both are shown from the start
            self.request_success.labels(finished_reason)

    def judged(self, verdict: Verdict, role: Role) -> None:
        """Count the verdict on a conversation, or the new verdict on a stream."""
        self.verdicts.labels(verdict.action, verdict.risk, verdict.category or "", role).inc()

    async def render(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        await self._engines.refresh()
        return generate_latest(self.registry)


class _Engines(Collector):
    """The counters of the engines, as of the latest `refresh`."""

    def __init__(self, engines: Mapping[str, AsyncEngine]) -> None:
        self._engines = engines
        self._stats: dict[str, dict[str, Any]] = {}
        self._up: dict[str, bool] = dict.fromkeys(engines, False)

    async def refresh(self) -> None:
        """Read the stats of all engines. An engine that does not answer in time keeps its old numbers."""

        async def ask(name: str, engine: AsyncEngine) -> None:
            try:
                self._stats[name] = await asyncio.wait_for(engine.stats(), _STATS_TIMEOUT_S)
                self._up[name] = True
            except Exception:  # closed, or a step that hangs: the old numbers stay
                self._up[name] = False

        await asyncio.gather(*(ask(name, engine) for name, engine in self._engines.items()))

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        up = GaugeMetricFamily(
            "guardengine:engine_up", "1 when the engine's thread answers.", labels=["model_name"]
        )
        for model, is_up in self._up.items():
            up.add_metric([model], is_up)
        yield up
        for name, text, entry in _GAUGES:
            gauge = GaugeMetricFamily(f"guardengine:{name}", text, labels=["model_name"])
            for model, stats in self._stats.items():
                gauge.add_metric([model], stats.get(entry, 0))
            yield gauge
        usage = GaugeMetricFamily(
            "guardengine:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", labels=["model_name"]
        )
        for model, stats in self._stats.items():
            if total := stats.get("kv_blocks_total"):
                usage.add_metric([model], 1 - stats["kv_blocks_free"] / total)
        yield usage
        for name, text, entry in _COUNTERS:
            counter = CounterMetricFamily(f"guardengine:{name}", text, labels=["model_name"])
            for model, stats in self._stats.items():
                counter.add_metric([model], stats.get(entry, 0))
            yield counter
        failures = CounterMetricFamily(
            "guardengine:failures",
            "Tokens that got no label, by the cause and by what the policy did.",
            labels=["model_name", "kind"],
        )
        for model, stats in self._stats.items():
            for kind, count in stats.get("failures", {}).items():
                failures.add_metric([model, kind], count)
        yield failures
