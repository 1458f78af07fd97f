"""Pages for people: GET /, the playground, and GET /docs, the description of the API.

Each is one file that loads nothing else, and its Content-Security-Policy makes the browser enforce that. The
playground needs no key, because it has no data; its calls to the API need one.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import re
from collections.abc import Iterable
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from guardengine.server.routes.api_page import api_page
from guardengine.server.service import service_of
from guardengine.server.settings import origin_of

router = APIRouter(include_in_schema=False)
PATHS = frozenset(("/", "/docs"))

_PLAYGROUND = Path(__file__).with_name("playground.html")


@router.get("/")
async def playground(request: Request) -> HTMLResponse:
    """The playground."""
    return _playground(service_of(request).settings.playground_upstream)


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """The HTTP API for people."""
    return _answer(api_page(request.app.openapi()), ())


@functools.lru_cache(maxsize=8)
def _playground(upstream: str | None) -> HTMLResponse:
    page = _PLAYGROUND.read_text(encoding="utf-8")
    hosts = ["'self'"]
    if upstream is not None:
        page = page.replace('data-upstream=""', f'data-upstream="{html.escape(upstream)}"', 1)
        hosts.append(origin_of(upstream))
    return _answer(page, hosts)


def _answer(page: str, connects_to: Iterable[str]) -> HTMLResponse:
    """A page with a Content-Security-Policy that allows its own scripts and styles, calls to `connects_to`, and
    nothing else."""
    policy = {
        "default-src": "'none'",
        "script-src": _hashes("script", page),
        "style-src": _hashes("style", page),
        "connect-src": " ".join(connects_to) or "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(page, headers=headers)


def _hashes(element: str, page: str) -> str:
    contents = re.findall(rf"<{element}\b[^>]*>(.*?)</{element}>", page, re.DOTALL)
    digests = (hashlib.sha256(content.encode()).digest() for content in contents)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests) or "'none'"
