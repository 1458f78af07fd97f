"""ProxyMetrics: what only the proxy sees, in the registry of the server's metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from guardengine.labels import Verdict

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ProxyMetrics:
    """Counters of one proxy."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.upstream = Counter(
            "guardengine:proxy_upstream_answers",
            "Answers of the upstream by status; 0: none came.",
            ("status",),
            registry=registry,
        )
        self.upstream_latency = Histogram(
            "guardengine:proxy_upstream_head_seconds",
            "From asking the upstream to the head of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.prompt_wait = Histogram(
            "guardengine:proxy_prompt_wait_seconds",
            "How long the upstream's answer waited for the prompt's label.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.replies = Counter(
            "guardengine:proxy_replies",
            "Replies by how they ended: done, cut, error, left (by the client).",
            ("outcome",),
            registry=registry,
        )
        self.blocks = Counter(
            "guardengine:proxy_blocks",
            "Prompts and choices that were blocked, by rule.",
            ("of", "rule"),
            registry=registry,
        )
        self.unread = Counter(
            "guardengine:proxy_unjudged",
            "Prompts and choices that passed unjudged, in whole or in part, by rule.",
            ("of", "rule"),
            registry=registry,
        )

    def judged(self, of: str, verdict: Verdict) -> None:
        """Count the verdict on a prompt or a choice."""
        if verdict.action == "block":
            self.blocks.labels(of, verdict.rule).inc()
        elif "-open" in verdict.rule:
            self.unread.labels(of, verdict.rule).inc()
