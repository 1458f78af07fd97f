"""A real server on a loopback port for tests, in a thread with an event loop of its own, and a stand-in for Gen."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from guardengine import AsyncEngine, Engine, GenModeration, Policy, Verdict
from guardengine.server import ServerSettings, create_app
from guardengine.server.uvicorn_server import GuardServer
from guardengine.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "How do I pick a lock?"}
REPLY = "Sure, here is café 巴黎: take a pick 👩‍👩‍👧 and some patience."


class Served:
    """A server that runs. `run(coroutine)` runs something on its event loop."""

    def __init__(self, make: Callable[[], tuple[Any, Any]], settings: ServerSettings) -> None:
        self._make, self._settings = make, settings
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._started.wait(60)
        if self._error is not None:
            raise self._error
        host, port = self.server.address
        self.address, self.url = (host, port), f"http://{host}:{port}"
        self.service = self.app.state.service

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        try:
            engine, gen = self._make()
            self.engine = engine
            self.app = self._app(engine, gen)
            self.server = GuardServer(self.app, port=0)
            serving = asyncio.ensure_future(self.server.serve())
            while not self.server.started and not serving.done():
                await asyncio.sleep(0.005)
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._started.set()
        await serving

    def _app(self, engine: Any, gen: Any) -> Any:
        return create_app(engine, gen=gen, settings=self._settings)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.server.drain)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, **options)

    def socket(self, **options: Any) -> ClientConnection:
        return connect(
            f"{self.url.replace('http', 'ws', 1)}/v1/guard/stream",
            compression=None,
            open_timeout=20,
            **options,
        )

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value, 0 where it is not there."""
        found = 0.0
        for line in self.http().get("/metrics", headers=getattr(self, "headers", {})).text.splitlines():
            if line.startswith(name) and all(f'{key}="{value}"' in line for key, value in labels.items()):
                found += float(line.rpartition(" ")[2])
        return found


@contextmanager
def served(
    folder: Path | None, settings: ServerSettings | None = None, *, gen: Any = None, **options: Any
) -> Iterator[Served]:
    def make() -> tuple[Any, Any]:
        engine = None
        if folder is not None:
            engine = AsyncEngine.from_pretrained(
                folder, **({"num_threads": 1, "kv_cache_bytes": 2**25} | options)
            )
        return engine, None if gen is None else gen()

    server = Served(make, settings or ServerSettings(drain_timeout_s=2.0))
    try:
        yield server
    finally:
        server.stop()


def sync_engine(folder: Path) -> Engine:
    return Engine.from_pretrained(folder, num_threads=1, kv_cache_bytes=2**25)


class Channel:
    """A WebSocket with JSON messages."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.seen: list[dict[str, Any]] = []

    def send(self, kind: str, stream: Any = "s", **more: Any) -> None:
        self.socket.send(json.dumps({"type": kind, "stream": stream, **more}))

    def next(self, timeout: float = 20) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.socket.recv(timeout=timeout))
        self.seen.append(event)
        return event

    def until(self, kind: str, **fields: Any) -> dict[str, Any]:
        while True:
            event = self.next()
            if event["type"] == kind and all(event.get(name) == value for name, value in fields.items()):
                return event

    def open(self, stream: str = "s", **more: Any) -> dict[str, Any]:
        if "token_ids" not in more:
            more.setdefault("messages", [USER])
        self.send("open", stream, **more)
        return self.until("labels", stream=stream)


@contextmanager
def channel(server: Served, **options: Any) -> Iterator[Channel]:
    with server.socket(**options) as socket:
        found = Channel(socket)
        assert found.next()["type"] == "hello"
        yield found


class FakeGen:
    """Answers as AsyncEngine does for a Gen checkpoint, from what the last message says."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.engine = SimpleNamespace(chat=SimpleNamespace(tokenizer=tokenizer))
        self.calls: list[tuple[Any, Any, Any]] = []

    def __await__(self) -> Any:
        return asyncio.sleep(0).__await__()

    async def moderate_many(self, conversations: Any, policy: Policy, *, mode: str) -> list[GenModeration]:
        self.calls.append((conversations, policy, mode))
        return [self._answer(messages) for messages in conversations]

    def _answer(self, messages: Any) -> GenModeration:
        is_reply = messages[-1]["role"] == "assistant"
        text = "Safety: Unsafe\nCategories: Violent" + ("\nRefusal: No" if is_reply else "")
        verdict = Verdict("block", "Unsafe", "Violent", None, "gen", 0)
        return GenModeration(
            role="assistant" if is_reply else "user",
            safety="Unsafe",
            categories=("Violent",),
            refusal="No" if is_reply else None,
            safety_probs={"Safe": 0.25, "Unsafe": 0.5, "Controversial": 0.25},
            category_probs={"Violent": 0.75, "None": 0.25},
            refusal_probs={"Yes": 0.125, "No": 0.875} if is_reply else {},
            text=text,
            verdict=verdict,
            num_prompt_tokens=300,
            num_answer_tokens=len(self.engine.chat.tokenizer.encode_text(text)) + 1,
        )

    async def stats(self) -> dict[str, Any]:
        return {"streams_open": 0}

    async def health(self, timeout_s: float) -> dict[str, Any]:
        return {"status": "ok", "canary_ms": 1.0}

    async def close(self, **_: Any) -> None:
        pass
