"""What the server costs: moderation requests a second, and tokens a second over WebSockets against the engine itself.

    python benchmarks/bench_server.py --connections 1000 --active 64 --json benchmarks/results/server-NAME.json

Makes stream-tiny weights, so that what is measured is the way to the model and back, not the model. The server runs in
a process of its own, the load in this one; on a machine of few cores they take time from each other, which the ratio
includes. Every label is counted. Labels are the engine's: tests/server/test_websocket.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect

from guardengine import AsyncEngine
from guardengine.checkpoint.random_weights import make_checkpoint
from guardengine.measuring.files import write_json
from guardengine.measuring.machine import machine_stamp

PROMPT = [151644, 872, 198, 9707, 11, 1246, 311, 1936, 264, 12764, 30, 151645]
TEXT = "How would one go about building a small shed in the garden?"
LIMITS = {"max_num_streams": 4096, "max_model_len": 512}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="Stream; default: random stream-tiny")
    parser.add_argument("--quantization", choices=("int8", "w8a8"))
    parser.add_argument("--threads", type=int, default=1, help="of the engine (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=1000, help="WebSockets open, a stream each")
    parser.add_argument("--active", type=int, default=64, help="of them, that append at a time")
    parser.add_argument("--tokens", type=int, default=100, help="appended by each active one, one at a time")
    parser.add_argument("--requests", type=int, default=1000, help="to /v1/moderations")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 16], help="of them at a time")
    parser.add_argument("--rounds", type=int, default=3, help="of engine and server, taking turns")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or make_checkpoint(Path(folder) / "tiny", "stream-tiny")
        result = measure(checkpoint, options)
    if options.json is not None:
        write_json(result, options.json)


def limits(options: argparse.Namespace) -> dict[str, Any]:
    found = {**LIMITS, "num_threads": options.threads, "quantization": options.quantization}
    found["kv_cache_bytes"] = 2**28 if options.checkpoint is None else 2**33
    return {name: value for name, value in found.items() if value is not None}


def measure(checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    asked = {name: value for name, value in vars(options).items() if name not in ("json", "checkpoint")}
    result: dict[str, Any] = {"machine": machine_stamp(), "options": asked, "moderations": [], "streams": []}
    with server(checkpoint, options) as (url, _):
        for in_flight in options.in_flight:
            row = asyncio.run(moderations(url, options.requests, in_flight))
            print(f"/v1/moderations, {in_flight} in flight: {row['per_s']:.0f}/s, ms {row['ms']}", flush=True)
            result["moderations"].append(row)
    for _ in range(options.rounds):
        own = asyncio.run(engine_streams(checkpoint, options))
        with server(checkpoint, options) as (url, _):
            served = asyncio.run(socket_streams(url, options))
        row = {"engine": own, "server": served, "ratio": served["tokens_per_s"] / own["tokens_per_s"]}
        result["streams"].append(row)
        print(
            f"{options.connections} open, {options.active} active: engine {own['tokens_per_s']:.0f} tokens/s, "
            f"ms {own['ms']}; server {served['tokens_per_s']:.0f} tokens/s, ms {served['ms']}",
            flush=True,
        )
    return result


@contextlib.contextmanager
def server(checkpoint: Path, options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-P", "-m", "guardengine", "serve", str(checkpoint), "--port", "0"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in limits(options).items()]
    command += ["--max-connections", "8192", "--log-level", "warning"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        if process.stdout is None:
            raise RuntimeError("the server has no output")
        try:
            yield process.stdout.readline().rpartition(" ")[2].strip(), process.pid
        finally:
            process.terminate()
            process.terminate()


async def moderations(url: str, num_requests: int, in_flight: int) -> dict[str, Any]:
    """Requests of a text each, every text another one; `in_flight` clients, each with a connection that stays."""
    took: list[float] = []

    async def post(client: httpx.AsyncClient, text: str) -> None:
        (await client.post("/v1/moderations", json={"input": text})).raise_for_status()

    async def ask(client: httpx.AsyncClient, first: int) -> None:
        for index in range(first, num_requests, in_flight):
            began = time.perf_counter()
            await post(client, f"{index} {TEXT}")
            took.append(time.perf_counter() - began)

    async with contextlib.AsyncExitStack() as stack:
        verify = httpx.create_ssl_context()  # which takes as long as four requests, in the load's only loop
        clients = [
            await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60, verify=verify))
            for _ in range(in_flight)
        ]
        await asyncio.gather(*(post(client, "first") for client in clients))
        settle()
        began = time.perf_counter()
        await asyncio.gather(*(ask(client, first) for first, client in enumerate(clients)))
        return {
            "in_flight": in_flight,
            "per_s": num_requests / (time.perf_counter() - began),
            "ms": percentiles(took),
        }


def settle() -> None:
    """Let the load's own garbage collection leave alone what is there by now: it would stop the clients."""
    gc.collect()
    gc.freeze()


async def engine_streams(checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Make the same appends to an AsyncEngine in this process, without a server, from tasks of one event loop."""
    took: list[float] = []

    async def append(stream: Any) -> None:
        for index in range(options.tokens):
            began = time.perf_counter()
            labels = await stream.append([100 + index])
            check(len(labels))
            took.append(time.perf_counter() - began)

    async with AsyncEngine.from_pretrained(checkpoint, **limits(options)) as engine:
        streams = [await engine.open(token_ids=PROMPT) for _ in range(options.connections)]
        for stream in streams:
            await stream.prompt()
        settle()
        began = time.perf_counter()
        await asyncio.gather(*(append(stream) for stream in streams[: options.active]))
        return rate(options, began, took)


async def socket_streams(url: str, options: argparse.Namespace) -> dict[str, Any]:
    took: list[float] = []

    async def append(socket: ClientConnection) -> None:
        for index in range(options.tokens):
            began = time.perf_counter()
            await socket.send(json.dumps({"type": "append", "stream": "s", "token_ids": [100 + index]}))
            event = await until(socket, "labels")
            check(len(event["labels"]))
            took.append(time.perf_counter() - began)

    async with contextlib.AsyncExitStack() as stack:
        sockets = []
        for _ in range(options.connections):
            uri = f"{url.replace('http', 'ws')}/v1/guard/stream"
            socket = await stack.enter_async_context(connect(uri, compression=None, ping_interval=None))
            opening = {"type": "open", "stream": "s", "token_ids": PROMPT, "scores": False}
            await socket.send(json.dumps(opening))
            await until(socket, "labels")
            sockets.append(socket)
        settle()
        began = time.perf_counter()
        await asyncio.gather(*(append(socket) for socket in sockets[: options.active]))
        found = rate(options, began, took)
        await asyncio.gather(*(socket.close() for socket in sockets))
        return found


async def until(socket: ClientConnection, kind: str) -> dict[str, Any]:
    while True:
        event: dict[str, Any] = json.loads(await socket.recv())
        if event["type"] == "error":
            raise RuntimeError(event)
        if event["type"] == kind:
            return event


def check(num_labels: int) -> None:
    if num_labels != 1:
        raise RuntimeError(f"{num_labels} labels came for a token")


def rate(options: argparse.Namespace, began: float, took: list[float]) -> dict[str, Any]:
    seconds = time.perf_counter() - began
    return {"tokens_per_s": options.active * options.tokens / seconds, "ms": percentiles(took)}


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {f"p{p}": round(1e3 * cuts[p - 1], 2) for p in (50, 90, 99)}


if __name__ == "__main__":
    main()
