"""Routes for operators: GET /health, /ready, /metrics (`monitoring`), /v1/models (`router`)."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request, Response

from guardengine.server.refusals import Refusal
from guardengine.server.replies import AsciiJson
from guardengine.server.schemas import ModelList
from guardengine.server.service import Service, service_of

monitoring = APIRouter()
router = APIRouter()
_STARTED = int(time.time())


@monitoring.get("/health")
async def health(request: Request) -> AsciiJson:
    """Run a token through every model, within a deadline. 503 when a model fails or its engine hangs. Needs no key."""
    service = service_of(request)
    found = await _health(service)
    is_well = all(report["status"] == "ok" for report in found.values())
    # Notes may name files and errors, and this answer is for everybody: they are left out.
    public = {
        name: {"status": report["status"], "canary_ms": report["canary_ms"]} for name, report in found.items()
    }
    return AsciiJson({"status": "ok" if is_well else "failing", "models": public}, 200 if is_well else 503)


@monitoring.get("/ready")
async def ready(request: Request) -> AsciiJson:
    """Whether new work is accepted. 503 while the server shuts down. Needs no key."""
    is_ready = not service_of(request).drain.has_begun
    return AsciiJson({"status": "ready" if is_ready else "draining"}, 200 if is_ready else 503)


@monitoring.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Counters and gauges in Prometheus's text format."""
    return Response(
        await service_of(request).metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


@router.get("/v1/models", response_model=ModelList)
async def models(request: Request) -> AsciiJson:
    """The models of this server."""
    return AsciiJson({"object": "list", "data": [_card(name) for name in service_of(request).engines]})


@router.get("/v1/models/{model:path}", include_in_schema=False)
async def model(model: str, request: Request) -> AsciiJson:
    """One model of this server."""
    if model not in service_of(request).engines:
        raise Refusal(404, f"model {model!r:.80} is not served here", "model_not_found", param="model")
    return AsciiJson(_card(model))


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": _STARTED, "owned_by": "guardengine"}


async def _health(service: Service) -> dict[str, dict[str, Any]]:
    engines = service.engines
    timeout_s = service.settings.health_timeout_s
    found = await asyncio.gather(
        *(engine.health(timeout_s) for engine in engines.values()), return_exceptions=True
    )
    closed = {"status": "failing", "canary_ms": None}  # the engine is closed, so its model cannot be asked
    return {
        name: report if isinstance(report, dict) else closed
        for name, report in zip(engines, found, strict=True)
    }
