"""create_app(): the ASGI application around engines. uvicorn serves it, or any other ASGI server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from guardengine._version import __version__
from guardengine.engine.async_engine import AsyncEngine
from guardengine.errors import ConfigError, GuardEngineError
from guardengine.server.auth import Authentication
from guardengine.server.limits import Limits, log_error
from guardengine.server.refusals import Refusal, refusal_of
from guardengine.server.replies import AsciiJson, reply_of
from guardengine.server.routes import chat as chat_routes
from guardengine.server.routes import guard as guard_routes
from guardengine.server.routes import operations, pages
from guardengine.server.schemas import ErrorResponse
from guardengine.server.service import Service
from guardengine.server.settings import ServerSettings
from guardengine.server.websocket import route as stream_route

_STATUSES = (400, 401, 404, 408, 413, 429, 500, 503, 504)


def create_app(
    engine: AsyncEngine | None = None,
    *,
    gen: AsyncEngine | None = None,
    settings: ServerSettings | None = None,
) -> FastAPI:
    """The ASGI application that serves engines over HTTP and WebSocket.

    The app takes the engines over: it waits for them when it starts and closes them when it ends, both in the server's
    event loop. `app.state.service` (a `Service`) is shared by all requests; routes that you add may use it.

    Args:
        engine: The engine of a Stream checkpoint. It may be loading still.
        gen: The engine of a Gen checkpoint. It may be loading still.
        settings: Names, defaults and limits; `ServerSettings()` by default.

    Returns:
        A FastAPI application. Its errors are answered in OpenAI's envelope.

    Raises:
        ConfigError: There is neither an engine of a Stream checkpoint nor one of a Gen checkpoint.
    """
    if engine is None and gen is None:
        raise ConfigError(
            "create_app() needs the AsyncEngine of a Stream checkpoint, or one of a Gen checkpoint"
        )
    return app_around(
        Service(engine, gen, settings or ServerSettings()),
        [
            operations.monitoring,
            *(m.router for m in (operations, guard_routes, chat_routes, stream_route, pages)),
        ],
        title="guardengine",
        description="Safety moderation with Qwen3Guard. The WebSocket at /v1/guard/stream is described in "
        "docs/serving/protocol.md.",
    )


def app_around(
    service: Service,
    routers: Sequence[APIRouter],
    *,
    title: str,
    description: str,
    beside: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
) -> FastAPI:
    """An application with the given routes behind API keys and limits. Its errors are answered in OpenAI's envelope.

    Args:
        service: The engines and settings. The app waits for the engines when it starts and closes them when it ends.
        routers: The routes, in the order in which they are tried.
        title: The name of the API in its description.
        description: What the API is for, in its description.
        beside: Makes a context manager that is open while the app runs.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _running(service), beside():
            yield

    app = FastAPI(
        title=title,
        version=__version__,
        description=description,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads scripts from other hosts; ours is in routes/pages.py
        redoc_url=None,
        responses={status: {"model": ErrorResponse} for status in _STATUSES},
        separate_input_output_schemas=False,
    )
    app.state.service = service
    for router in routers:
        app.include_router(router)
    for kind in (GuardEngineError, Refusal, TimeoutError):
        app.add_exception_handler(kind, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_form)
    app.add_exception_handler(HTTPException, _refuse_http)
    # The last one added is the outermost: no key, no body read.
    app.add_middleware(Limits, service=service, paths=pages.PATHS.union(app.openapi()["paths"]))
    app.add_middleware(Authentication, service=service)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return app


@asynccontextmanager
async def _running(service: Service) -> AsyncIterator[None]:
    engines = list(service.engines.values())
    try:
        for engine in engines:
            await engine
        yield
    finally:
        service.drain.begin()
        for engine in engines:
            await engine.close(timeout_s=service.settings.drain_timeout_s)


async def _refuse(request: Request, error: Exception) -> AsciiJson:
    service: Service = request.app.state.service
    refusal = refusal_of(error, service.settings.retry_after_s)
    service.metrics.refused.labels(refusal.code).inc()
    if refusal.status == 500 and isinstance(
        error, GuardEngineError
    ):  # other errors reach Limits, which logs them
        log_error(error, with_message=service.settings.log_text)
    return reply_of(refusal)


async def _refuse_form(request: Request, error: Any) -> AsciiJson:
    """Answer a request whose body does not fit the schema. The answer names the place, and never quotes the value."""
    first = error.errors()[0]
    param = _place(first["loc"]) or None
    if first["type"] == "json_invalid":
        refusal = Refusal(400, "the body is not JSON", "invalid_json")
    else:
        refusal = Refusal(
            400, f"{param or 'the body'}: {first['msg']}; see /openapi.json", "invalid_request", param=param
        )
    return await _refuse(request, refusal)


def _place(steps: Iterable[Any]) -> str:
    """The place of a value in the body, such as input[2].text."""
    place = ""
    for step in steps:
        if isinstance(step, int):
            place += f"[{step}]"
        elif (
            step not in ("body", "str") and "[" not in step
        ):  # names that pydantic gives to the types of a union
            place += f".{step}" if place else step
    return place[:200]


async def _refuse_http(request: Request, error: Any) -> AsciiJson:
    """Answer errors of the framework: an unknown path, a method that is not allowed, a body that cannot be parsed."""
    codes = {404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "invalid_request")
    refusal = Refusal(error.status_code, str(error.detail), code)
    service: Service = request.app.state.service
    service.metrics.refused.labels(code).inc()
    return reply_of(refusal, getattr(error, "headers", None))
