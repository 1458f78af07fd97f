"""What the tests of the proxy share: an upstream that sends whatever bytes it is told to, and a proxy before it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from serving import Served

from guardengine import AsyncEngine, Policy
from guardengine.proxy import ProxySettings, create_proxy
from guardengine.server import ServerSettings

USER = {"role": "user", "content": "Where?"}
DONE = b"data: [DONE]\n\n"
HANG, RESET = "hang", "reset"  # steps: wait until the proxy hangs up; break the connection off
Steps = Iterable[bytes | float | str]


class Asked(NamedTuple):
    """A request that the upstream got."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> list[str]:
        return [value for known, value in self.headers if known == name]


class Upstream:
    """Answers every request with the steps of `script`: bytes to send, seconds to wait, HANG or RESET."""

    def __init__(self) -> None:
        self.script: Callable[[Asked], Steps] = lambda asked: sse(chunk("Hi"), chunk(None, "stop"), DONE)
        self.asked: list[Asked] = []
        self.num_left = 0  # connections that the proxy ended while it was being answered
        self.num_open = 0
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._started.wait(20)

    async def _main(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{self.port}"
            self._started.set()
            await self._over.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    def wait_until_left(self, num_left: int) -> None:
        """Until the proxy has hung up as often; it may have answered its client before."""
        deadline = time.monotonic() + 10
        while self.num_left < num_left and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.num_left == num_left

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_open += 1
        try:
            while (asked := await self._read(reader)) is not None:
                self.asked.append(asked)
                await self._answer(asked, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.num_open -= 1
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Asked | None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = [
                (name.lower(), value.strip())
                for name, _, value in (line.partition(":") for line in head[1:-2])
            ]
            size = int(dict(headers).get("content-length", 0))
            return Asked(head[0], headers, await reader.readexactly(size))
        return None

    async def _answer(self, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        leaving = asyncio.ensure_future(reader.read(1))
        has_ended = False
        try:
            for step in self.script(asked):
                if isinstance(step, bytes):
                    writer.write(step)
                    await writer.drain()
                elif step == RESET:
                    writer.transport.abort()
                    raise ConnectionResetError
                else:
                    await asyncio.wait([leaving], timeout=None if step == HANG else float(step))
                if leaving.done():
                    self.num_left += 1
                    raise ConnectionResetError
            has_ended = True
        except ConnectionError:
            if not has_ended and not leaving.done():
                self.num_left += 1
            raise
        finally:
            leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await leaving


def chunk(
    content: str | None, finish: str | None = None, index: int = 0, more: dict[str, Any] | None = None
) -> bytes:
    """An event of a stream, as vLLM writes them."""
    choice = {
        "index": index,
        "delta": ({} if content is None else {"content": content}) | (more or {}),
        "logprobs": None,
        "finish_reason": finish,
    }
    return event(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "m",
            "choices": [choice],
        }
    )


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def http(body: bytes, status: str = "200 OK", kind: str = "application/json", more: str = "") -> list[bytes]:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return [head.encode() + body]


def sse(*steps: Any, kind: str = "text/event-stream", ends: bool = True) -> list[Any]:
    """The steps of a stream: its head, then each piece as a chunk of HTTP's own."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    framed = [
        f"{len(step):x}\r\n".encode() + step + b"\r\n" if isinstance(step, bytes) and step else step
        for step in steps
    ]
    return [head, *framed, *([b"0\r\n\r\n"] if ends else [])]


def completion(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A whole completion, a choice for each message."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant"} | message,
            "logprobs": None,
            "finish_reason": "stop",
        }
        for index, message in enumerate(messages)
    ]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": choices,
        **more,
    }


class Reply(NamedTuple):
    """A stream as a client reads it. bytes: all of it."""

    status: int
    headers: httpx.Headers
    bytes: bytes

    @property
    def events(self) -> list[bytes]:
        return [event + b"\n\n" for event in self.bytes.split(b"\n\n")[:-1]]

    @property
    def chunks(self) -> list[Any]:
        return [json.loads(e[6:]) for e in self.events if e.startswith(b"data: {")]

    def text(self, index: int = 0, name: str = "content") -> str:
        return "".join(choice["delta"].get(name) or "" for choice in self._choices(index))

    def finish(self, index: int = 0) -> str | None:
        reasons = [choice["finish_reason"] for choice in self._choices(index)]
        return next((reason for reason in reasons if reason), None)

    @property
    def is_done(self) -> bool:
        return self.bytes.endswith(DONE)

    @property
    def error(self) -> str | None:
        return next((c["error"]["code"] for c in self.chunks if "error" in c), None)

    @property
    def verdicts(self) -> Any:
        [comment] = [e for e in self.events if e.startswith(b": guardengine ")]
        return json.loads(comment.removeprefix(b": guardengine "))

    def _choices(self, index: int) -> list[Any]:
        return [choice for c in self.chunks for choice in c.get("choices", ()) if choice["index"] == index]


class Proxied(Served):
    """A proxy that runs."""

    def __init__(self, make: Callable[[], tuple[Any, Any]], settings: ProxySettings) -> None:
        self._proxy_settings = settings
        super().__init__(make, settings.server)

    def _app(self, engine: Any, gen: Any) -> Any:
        return create_proxy(engine, self._proxy_settings)

    def post(self, body: dict[str, Any] | bytes | None = None, **options: Any) -> httpx.Response:
        """A request for a completion, whole or streamed."""
        raw = body if isinstance(body, bytes) else json.dumps(asking() | (body or {})).encode()
        headers = {"content-type": "application/json"} | options.pop("headers", {})
        with self.http(**options) as client:
            return client.post("/v1/chat/completions", content=raw, headers=headers)

    def stream(self, **more: Any) -> Reply:
        found = self.post({"stream": True} | more)
        return Reply(found.status_code, found.headers, found.content)


def asking(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [USER], **more}


@contextmanager
def proxied(
    folder: Path,
    upstream: Upstream,
    *,
    policy: Policy | None = None,
    server: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Proxied]:
    limits = {"drain_timeout_s": 2.0, "policy": policy or Policy.strict(debounce=1)} | (server or {})
    settings = ProxySettings(
        **{"upstream": upstream.url, "append_timeout_s": 20.0, "prompt_timeout_s": 20.0} | options,
        server=ServerSettings(**limits),
    )
    sizes = {"num_threads": 1, "kv_cache_bytes": 2**25} | (engine or {})
    proxy = Proxied(lambda: (AsyncEngine.from_pretrained(folder, **sizes), None), settings)
    try:
        yield proxy
    finally:
        proxy.stop()
