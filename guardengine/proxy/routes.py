"""The proxy's paths: chat completions, moderated; models and embeddings, which generate nothing; no others."""

from __future__ import annotations

import re

from fastapi import APIRouter, Request
from starlette.responses import Response

from guardengine.proxy.chat_request import read_call, read_object
from guardengine.proxy.errors import broken
from guardengine.proxy.exchange import Exchange, Proxy
from guardengine.proxy.strict_json import write_json
from guardengine.proxy.upstream import media_type, returned
from guardengine.server.refusals import Refusal
from guardengine.server.service import tenant_of

router = APIRouter()
_MODEL = re.compile(r"[\w.:@-]+(/[\w.:@-]+)*", re.ASCII)
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
# Of these APIs something generates, or hands out what was generated before.
_GENERATING_NAMES = (
    "completions responses chat audio images videos realtime assistants threads batches edits messages fine_tuning "
    "conversations evals"
)
_GENERATING = frozenset(_GENERATING_NAMES.split())


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(request: Request) -> Response:
    """The upstream's completion of a chat, of which only what the guard has cleared is shown."""
    proxy = _proxy_of(request)
    body = await _body(request)
    call = read_call(body, proxy.settings)
    return await Exchange(proxy, call, proxy.upstream.headers(request), tenant_of(request)).begin()


@router.get("/v1/models", response_model=None)
async def models(request: Request) -> Response:
    """The upstream's models."""
    return await _forward(request, "GET", "/v1/models")


@router.get("/v1/models/{model:path}", response_model=None)
async def model(model: str, request: Request) -> Response:
    """One of them."""
    if not _MODEL.fullmatch(model) or any(part.strip(".") == "" for part in model.split("/")):
        raise Refusal(404, "no model has such a name", "model_not_found", param="model")
    return await _forward(request, "GET", f"/v1/models/{model}")


@router.post("/v1/embeddings", response_model=None)
async def embeddings(request: Request) -> Response:
    """The upstream's embeddings. Nothing is generated, so nothing is moderated."""
    body = write_json(read_object(await _body(request)))
    return await _forward(request, "POST", "/v1/embeddings", body)


@router.api_route("/v1/{path:path}", methods=_METHODS, include_in_schema=False)
async def others(path: str) -> Response:
    """Everything else, which would pass the guard by."""
    if path.partition("/")[0] in _GENERATING:
        raise Refusal(
            501,
            f"/v1/{path[:80]} is not moderated by this proxy, so it is not passed on; use /v1/chat/completions",
            "not_moderated",
        )
    raise Refusal(404, f"/v1/{path[:80]} is not passed on by this proxy", "not_found")


async def _body(request: Request) -> bytes:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(
            415, "the body is compressed (Content-Encoding); send it as it is", "unsupported_encoding"
        )
    return await request.body()


async def _forward(request: Request, method: str, path: str, body: bytes | None = None) -> Response:
    upstream = _proxy_of(request).upstream
    async with upstream.asked(method, path, upstream.headers(request), body) as response:
        if response.status_code >= 400:
            found = await upstream.error_of(response)
        elif response.status_code != 200 or media_type(response) != "application/json":
            raise broken("an answer that is no application/json with status 200")
        else:
            found = await upstream.whole(response)
        return Response(found, response.status_code, returned(response), "application/json")


def _proxy_of(request: Request) -> Proxy:
    proxy: Proxy = request.app.state.proxy
    return proxy
