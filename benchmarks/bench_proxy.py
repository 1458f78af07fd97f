"""What the proxy adds: to the first text, and between two words, of streams that an LLM writes at a steady rate.

    guardengine make-checkpoint --preset stream-0.6b /tmp/guard
    python benchmarks/bench_proxy.py /tmp/guard --rate 8 --json benchmarks/results/proxy-NAME.json

The upstream is a fake one that sends each word at its time, in a process of its own; the proxy is another, the clients
are this one. As in `guardengine proxy`, none of them stops to look for garbage in what it has loaded. Both ways are
measured in the same run, taking turns. Times are also given in the guard's own steps: the median time of a step of as
many streams with a token each, measured first.

"First text" is shown when the guard has what settles it, which is the next word: `beyond hold-back` takes that one
interval off. With --prompts, long prompts of others are judged beside the replies. Every word is counted; with the
policy given here nothing is blocked.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from guardengine import AsyncEngine, Engine, Policy
from guardengine.cli.proxy import MAX_STEP_MS
from guardengine.engine.memory import collect_rarely
from guardengine.measuring.files import check_writable, write_json
from guardengine.measuring.machine import machine_stamp

QUESTION = "How would one go about building a small shed in the garden?"
WORDS = ("shed", "garden", "timber", "roof", "window", "paint", "ladder", "nail")  # of others' prompts
OPEN = Policy.loose(risk_thresholds={"Unsafe": 1.0})  # random weights would block


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--streams", type=int, default=16, help="at a time (default: %(default)s)")
    parser.add_argument(
        "--rate", type=float, default=8.0, help="words a second and stream (default: %(default)s)"
    )
    parser.add_argument("--words", type=int, default=64, help="of a reply (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of both ways (default: %(default)s)")
    parser.add_argument(
        "--prompts",
        type=float,
        default=0.0,
        metavar="RATE",
        help="further conversations that begin each second, each with a prompt of its own (default: none)",
    )
    parser.add_argument(
        "--prompt-words", type=int, default=200, help="of each of those (default: %(default)s)"
    )
    parser.add_argument(
        "--max-step-ms",
        type=float,
        default=MAX_STEP_MS,
        help="of the guard (default: %(default)s, the proxy's)",
    )
    parser.add_argument("--quantization", default="int8", help="int8, w8a8 or none (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of the guard (default: one a core)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--part", choices=("upstream", "proxy"), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "upstream":
        asyncio.run(run_app(upstream_app()))
    elif options.part == "proxy":
        asyncio.run(run_proxy(options))
    else:
        if options.json is not None:
            check_writable(options.json)
        result = measure(options)
        if options.json is not None:
            write_json(result, options.json)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    asked = {name: str(value) for name, value in vars(options).items() if name not in ("json", "part", "url")}
    step_s = guard_step(options)
    print(f"a step of {options.streams} streams, a token each: {1e3 * step_s:.1f} ms", flush=True)
    result: dict[str, Any] = {"machine": machine_stamp(), "options": asked, "step_ms": 1e3 * step_s}
    seen: dict[str, list[list[float]]] = {"direct": [], "proxy": []}
    collect_rarely()
    with part("upstream", options) as upstream, part("proxy", options, upstream) as proxy:
        asyncio.run(replies(proxy, options, 2))  # warm
        for _ in range(options.rounds):
            for way, url in (("direct", upstream), ("proxy", proxy)):
                seen[way] += asyncio.run(replies(url, options, options.words))
    for way, runs in seen.items():
        gaps = [later - earlier for times in runs for earlier, later in pairwise(times)]
        result[way] = {"first_ms": milliseconds([times[0] for times in runs]), "gap_ms": milliseconds(gaps)}
    interval_ms = 1e3 / options.rate
    for what in ("first_ms", "gap_ms"):
        for p in ("p50", "p99"):
            direct = result["direct"][what][p]
            added = result["proxy"][what][p] - direct
            steps = added / result["step_ms"]
            line = f"{what[:-3]} {p}: direct {direct:.1f} ms, added {added:.1f} ms, {steps:.2f} steps"
            if what == "first_ms":
                line += f"; beyond hold-back {(added - interval_ms) / result['step_ms']:.2f} steps"
            print(line, flush=True)
    return result


def engine_options(options: argparse.Namespace) -> dict[str, Any]:
    quantization = None if options.quantization == "none" else options.quantization
    threads = {} if options.threads is None else {"num_threads": options.threads}
    return {
        "quantization": quantization,
        "kv_cache_bytes": 2**29,
        "max_model_len": 2048,
        "max_step_ms": options.max_step_ms,
        **threads,
    }


def guard_step(options: argparse.Namespace) -> float:
    """Median seconds of a step in which each of the streams has one token."""
    with Engine.from_pretrained(options.checkpoint, **engine_options(options)) as engine:
        message = [{"role": "user", "content": QUESTION}]
        streams = [engine.open(message, policy=OPEN) for _ in range(options.streams)]
        engine.run()
        took = []
        for number in range(12):
            for stream in streams:
                stream.append([1000 + number])
            began = time.perf_counter()
            engine.run()
            took.append(time.perf_counter() - began)
        return statistics.median(took[2:])


# -- the parts, in processes of their own ------------------------------------------------------------------


@contextlib.contextmanager
def part(name: str, options: argparse.Namespace, url: str = "") -> Iterator[str]:
    command = [sys.executable, "-P", __file__, str(options.checkpoint), "--part", name, "--url", url]
    command += ["--quantization", options.quantization]
    command += [] if options.threads is None else ["--threads", str(options.threads)]
    command += ["--max-step-ms", str(options.max_step_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        if process.stdout is None:
            raise RuntimeError("the part has no output")
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def upstream_app() -> FastAPI:
    """Sends words at the times that its request's `seed` (words) and `temperature` (seconds between two) say."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> StreamingResponse:
        asked = await request.json()

        async def frames() -> AsyncIterator[str]:
            began = time.perf_counter()
            yield frame({"role": "assistant", "content": ""})
            for number in range(asked["seed"]):
                due = began + (number + 1) * asked["temperature"]
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                yield frame({"content": " word"})
            yield frame({}, "stop")
            yield "data: [DONE]\n\n"

        return StreamingResponse(frames(), media_type="text/event-stream")

    return app


def frame(delta: dict[str, str], reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return f"data: {json.dumps({'id': 'c', 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


async def run_app(app: Any) -> None:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", http="httptools"))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    collect_rarely()
    print(f"http://{host}:{port}", flush=True)
    await running


async def run_proxy(options: argparse.Namespace) -> None:
    from guardengine.proxy import ProxySettings, create_proxy
    from guardengine.server import ServerSettings

    engine = await AsyncEngine.from_pretrained(options.checkpoint, **engine_options(options))
    await run_app(
        create_proxy(engine, ProxySettings(upstream=options.url, server=ServerSettings(policy=OPEN)))
    )


# -- clients -----------------------------------------------------------------------------------------------


async def replies(url: str, options: argparse.Namespace, num_words: int) -> list[list[float]]:
    """For each stream, when each of its words came, in seconds from its request."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "stream": True}
    body |= {"seed": num_words, "temperature": 1 / options.rate}

    async def one(client: httpx.AsyncClient, delay_s: float) -> list[float]:
        await asyncio.sleep(delay_s)  # streams are not in step
        began, times = time.perf_counter(), list[float]()
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            if response.is_error:
                raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:300]!r}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text = json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                    times += [time.perf_counter() - began] * text.count(" word")
        if len(times) != num_words:
            raise RuntimeError(f"{len(times)} of {num_words} words came")
        return times

    async def read(client: httpx.AsyncClient, asked: dict[str, Any]) -> None:
        with contextlib.suppress(httpx.HTTPError):
            await client.post(f"{url}/v1/chat/completions", json=asked)

    async def begin_others(client: httpx.AsyncClient) -> None:
        while True:
            await asyncio.sleep(1 / options.prompts)
            prompt = " ".join(
                f"{random.choice(WORDS)}{random.randrange(10)}" for _ in range(options.prompt_words)
            )
            other = body | {"messages": [{"role": "user", "content": prompt}], "seed": 1}
            others.append(asyncio.create_task(read(client, other)))

    others: list[asyncio.Task[Any]] = []
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        if options.prompts:
            others.append(asyncio.create_task(begin_others(client)))
        delays = [number / options.streams / options.rate for number in range(options.streams)]
        times = await asyncio.gather(*(one(client, delay) for delay in delays))
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return times


def milliseconds(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {f"p{p}": 1e3 * cuts[p - 1] for p in (50, 90, 99)}


if __name__ == "__main__":
    main()
