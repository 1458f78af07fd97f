"""Service: the engines, settings, metrics and drain that all requests of one app share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from starlette.requests import HTTPConnection

from guardengine.engine.async_engine import AsyncEngine
from guardengine.server.drain import Drain
from guardengine.server.metrics import Metrics
from guardengine.server.refusals import Refusal, not_served
from guardengine.server.settings import ServerSettings

# Prefixes of the models that clients of OpenAI's moderations API ask for by default.
_ALIASES = ("omni-moderation-", "text-moderation-")


@dataclass(slots=True)
class Service:
    """Shared by all requests of one app.

    Attributes:
        stream: The engine of a Stream checkpoint, None where there is none.
        gen: The engine of a Gen checkpoint, None where there is none.
        settings: The server's options.
        metrics: The counters for Prometheus.
        drain: Whether the server is shutting down.
    """

    stream: AsyncEngine | None
    gen: AsyncEngine | None
    settings: ServerSettings
    metrics: Metrics = field(init=False)
    drain: Drain = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engines)
        self.drain = Drain(self.settings.drain_timeout_s)

    @property
    def engines(self) -> dict[str, AsyncEngine]:
        """The engines by the names of their models."""
        both = ((self.settings.model_name, self.stream), (self.settings.gen_model_name, self.gen))
        return {name: engine for name, engine in both if engine is not None}

    def stream_engine(self, model: str | None = None) -> AsyncEngine:
        """The Stream engine for a request that names `model`. Raises Refusal, 404, for another name or where there is
        none."""
        name = self.settings.model_name
        if self.stream is None:
            raise not_served("a Stream checkpoint", "start guardengine serve with one")
        if model is not None and model != name and not model.startswith(_ALIASES):
            raise not_served(f"model {model!r:.80}", f"this endpoint has {name!r}; or leave model out")
        return self.stream

    def gen_engine(self, model: str | None = None) -> AsyncEngine:
        """The Gen engine for a request that names `model`. Raises Refusal, 404, for another name or where there is
        none."""
        name = self.settings.gen_model_name
        if self.gen is None:
            raise not_served("a Gen checkpoint", "start guardengine serve with --gen CHECKPOINT")
        if model is not None and model != name:
            raise not_served(f"model {model!r:.80}", f"this endpoint has {name!r}")
        return self.gen


def service_of(connection: HTTPConnection) -> Service:
    """The Service of the app that a request or WebSocket came to."""
    service: Any = connection.app.state.service
    return service  # type: ignore[no-any-return]


def tenant_of(connection: HTTPConnection) -> str:
    """The name of the API key that a request or WebSocket came with; "" without keys."""
    return connection.scope.get("guardengine.tenant", "")  # type: ignore[no-any-return]


def too_many(what: str, limit: int, option: str, retry_after_s: float) -> Refusal:
    """The refusal, 429, of what would exceed a limit. option: the name of the setting."""
    return Refusal(
        429,
        f"{limit} {what}, {option}={limit}; retry when some are done",
        "overloaded",
        type="rate_limit_error",
        retry_after_s=retry_after_s,
    )
