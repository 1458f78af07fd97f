"""Guard: the ASGI application of the server as a Ray Serve deployment. application(): the argument of serve.run.

A replica is a process with its own engines and the application of `guardengine serve`. Ray's proxies accept the
connections and give each to the replica with the fewest; a WebSocket stays on its replica.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from guardengine.checkpoint.hub import resolve_checkpoint
from guardengine.engine.async_engine import AsyncEngine
from guardengine.engine.memory import collect_rarely
from guardengine.errors import ServerError
from guardengine.on_ray.lag import LAG, LagPolicy
from guardengine.on_ray.scale import Scale
from guardengine.server.app import create_app
from guardengine.server.serve import by_kind, log_to_stderr
from guardengine.server.settings import ServerSettings

_MAX_LOADS = 3  # attempts at starting replicas before Ray gives the deployment up


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What every replica serves.

    Attributes:
        checkpoint: The folder or hub id of a checkpoint. Each node looks for it on its own disk or on the hub.
        revision: The revision of `checkpoint` on the hub.
        gen: The folder or hub id of a Gen checkpoint.
        gen_revision: The revision of `gen` on the hub.
        options: Options of `AsyncEngine.from_pretrained`, for both checkpoints.
        settings: Names, defaults and limits of the server.
        log_level: The least level of messages on stderr.
    """

    checkpoint: str
    revision: str | None = None
    gen: str | None = None
    gen_revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    settings: ServerSettings = field(default_factory=ServerSettings)
    log_level: str = "info"

    def paths(self) -> dict[str, Path]:
        """The folders on this node, by kind. Raises CheckpointError and ConfigError."""
        return by_kind(resolve_checkpoint(self.checkpoint, self.revision), self.gen, self.gen_revision)

    def with_whole_paths(self) -> Served:
        """With absolute paths, because replicas have other working folders."""
        names = {
            name: os.path.abspath(os.path.expanduser(value))
            for name in ("checkpoint", "gen")
            if (value := getattr(self, name)) is not None and os.path.isdir(os.path.expanduser(value))
        }
        return replace(self, **names)


@serve.deployment(max_constructor_retry_count=_MAX_LOADS)
@serve.ingress()
class Guard:
    """One replica. Ray calls all of its methods in one event loop, which is also the engines'."""

    async def __init__(self, served: Served, num_threads: int) -> None:  # type: ignore[misc]
        log_to_stderr(served.log_level)
        self._served = served
        self._engines: dict[str, AsyncEngine] = {}
        options = {"num_threads": num_threads, **served.options}
        if "audit_log" in options:  # a log has one writer
            replica = serve.get_replica_context().replica_id.unique_id
            options["audit_log"] = f"{options['audit_log']}.{replica}"
        for kind, path in served.paths().items():
            own = {name: value for name, value in options.items() if kind == "stream" or name != "audit_log"}
            self._engines[kind] = await AsyncEngine.from_pretrained(path, **own)
        collect_rarely()

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(
            self._engines.get("stream"), gen=self._engines.get("gen"), settings=self._served.settings
        )

    async def check_health(self) -> None:
        """Raise when an engine hangs or fails. Ray replaces a replica for which this raises repeatedly."""
        for kind, engine in self._engines.items():
            report = await engine.health(self._served.settings.health_timeout_s)
            if report["status"] != "ok":
                raise ServerError(f"the {kind} engine is {report['status']}: {report['note']}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The lag of the slowest engine, for LagPolicy."""
        return {LAG: max([(await engine.stats())["lag_s"] for engine in self._engines.values()])}


def application(served: Served, scale: Scale) -> serve.Application:
    """The application for serve.run.

    Args:
        served: What every replica serves.
        scale: The number of replicas, and their resources.
    """
    settings = served.settings
    options: dict[str, Any] = {"num_replicas": scale.least}
    if scale.most > scale.least:
        policy = AutoscalingPolicy(
            policy_function=LagPolicy, policy_kwargs={"target_lag_s": scale.target_lag_ms / 1000}
        )
        options = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scale.least,
                max_replicas=scale.most,
                upscale_delay_s=scale.upscale_delay_s,
                downscale_delay_s=scale.downscale_delay_s,
                policy=policy,
            )
        }
    guard: Any = Guard  # a Deployment, by its decorators
    deployment = guard.options(
        ray_actor_options={"num_cpus": scale.num_cpus, "num_gpus": scale.num_gpus},
        max_ongoing_requests=settings.max_connections,  # Ray's default is 5, and a WebSocket counts as one
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        **options,
    )
    return deployment.bind(served.with_whole_paths(), scale.num_cpus)
