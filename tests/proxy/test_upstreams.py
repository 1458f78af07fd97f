"""Upstreams that send garbage, stop half-way or say nothing, clients that leave, guards that fail: all end closed."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from proxying import (
    DONE,
    HANG,
    RESET,
    Proxied,
    Upstream,
    asking,
    chunk,
    completion,
    event,
    http,
    proxied,
    sse,
)

from guardengine import Policy

pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.usefixtures("bombs_are_unsafe")]


@pytest.fixture(scope="module")
def proxy(folder, upstream) -> Iterator[Proxied]:
    limits = {"max_event_bytes": 2**14, "max_reply_bytes": 2**15, "upstream_timeout_s": 0.5}
    with proxied(folder, upstream, **limits) as proxy:
        yield proxy


def settle(proxy: Proxied, upstream: Upstream | None = None) -> None:
    """Nothing stays open: no stream of the guard's, no answer of the upstream's."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if proxy.run(proxy.engine.stats())["streams_open"] == 0:
            return
        time.sleep(0.01)
    raise AssertionError("streams are left open")


FIRST = chunk("One two")


# -- before anything is shown: a status of its own ---------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "status", "code"),
    [
        ([RESET], 502, "upstream_truncated"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], 502, "upstream_truncated"),
        (
            [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello"],
            502,
            "upstream_truncated",
        ),
        ([HANG], 504, "upstream_timeout"),
        (http(b"x", "302 Found", more="Location: http://127.0.0.1:9/\r\n"), 502, "upstream_broken"),
        (http(b"{}", "204 No Content"), 502, "upstream_broken"),
        (http(b"<html>", kind="text/html"), 502, "upstream_broken"),
        (http(json.dumps(completion({"content": "a bomb"})).encode()), 502, "upstream_broken"),
        (
            http(gzip.compress(DONE, mtime=0), kind="text/event-stream", more="Content-Encoding: gzip\r\n"),
            502,
            "upstream_broken",
        ),
        (http(b"oops", "500 Internal Server Error", kind="text/plain"), 502, "upstream_failed"),
        (http(b"x" * 70_000, "500 Internal Server Error"), 502, "upstream_broken"),
        (sse(b"data: " + b"x" * 20_000), 502, "upstream_broken"),
        (sse(b"data: x\n\n"), 502, "upstream_broken"),
        (sse(b'data: {"choices": [], "choices": []}\n\n'), 502, "upstream_broken"),
        (sse(b"data: {}\n\n"), 502, "upstream_broken"),
        (sse(b"data: []\n\n"), 502, "upstream_broken"),
        (sse(event({"choices": [{"index": 1, "delta": {"content": "x"}}]})), 502, "upstream_broken"),
        (sse(event({"choices": [{"index": 0, "delta": {}}] * 2})), 502, "upstream_broken"),
        (sse(event({"choices": [{"index": 0, "delta": "x"}]})), 502, "upstream_broken"),
        (sse(event({"choices": [{"index": 0, "text": "x"}]})), 502, "upstream_broken"),
        (sse(event({"choices": [5]})), 502, "upstream_broken"),
        (
            sse(event({"choices": [{"index": 0, "delta": {"audio": {"data": "eA=="}}}]})),
            502,
            "upstream_broken",
        ),
        (sse(event({"choices": [{"index": 0, "delta": {"tool_calls": ["x"]}}]})), 502, "upstream_broken"),
        (sse(b"\xef\xbb\xbf" + FIRST), 502, "upstream_broken"),
        (sse(b"Data" + FIRST[4:]), 502, "upstream_broken"),
        (sse(b": \xe2\x80\xa8data: {}\n\n"), 502, "upstream_broken"),
        (sse(b": \xff\n\n"), 502, "upstream_broken"),
        (
            sse(b'data: {"choices": [{"index": 0, "delta": {"content": "\\ud83d"}}]}\n\n'),
            502,
            "upstream_broken",
        ),
        (sse(), 502, "upstream_truncated"),
    ],
)
def test_broken_from_the_start(proxy, upstream, steps, status, code) -> None:
    upstream.script = lambda asked: steps
    found = proxy.post({"stream": True})
    assert (found.status_code, found.json()["error"]["code"]) == (status, code)
    settle(proxy)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"choices": [', "upstream_broken"),
        (b'{"choices": 5}', "upstream_broken"),
        (b'{"choices": [{"message": {"content": "a", "content": "b"}}]}', "upstream_broken"),
        (json.dumps(completion({"content": "x" * 40_000})).encode(), "upstream_broken"),
        (json.dumps(completion({"content": "x"}, {"content": "y"})).encode(), "upstream_broken"),
    ],
)
def test_broken_whole_replies(proxy, upstream, body, code) -> None:
    upstream.script = lambda asked: http(body)
    found = proxy.post()
    assert (found.status_code, found.json()["error"]["code"]) == (502, code)
    upstream.script = lambda asked: [http(body)[0][:-3], RESET]
    assert proxy.post().status_code == 502
    settle(proxy)


def test_errors_of_the_upstreams_are_passed_on(proxy, upstream) -> None:
    error = b'{"error": {"message": "too long", "code": 400}}'
    upstream.script = lambda asked: http(error, "400 Bad Request", more="Retry-After: 3\r\n")
    for stream in (False, True):
        found = proxy.post({"stream": stream})
        assert (found.status_code, found.content, found.headers["retry-after"]) == (400, error, "3")
    with proxy.http() as client:
        assert client.get("/v1/models").content == error


def test_an_upstream_that_is_not_there(folder) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))

        class Nobody:
            url = f"http://127.0.0.1:{unused.getsockname()[1]}"

        with proxied(folder, Nobody()) as proxy:  # type: ignore[arg-type]
            found = proxy.post()
            assert (found.status_code, found.json()["error"]["code"]) == (502, "upstream_unreachable")
            assert str(unused.getsockname()[1]) not in found.text


# -- later: an error in the stream, and nothing that was not judged ----------------------------------------


@pytest.mark.parametrize(
    ("steps", "code"),
    [
        ([RESET], "upstream_truncated"),
        ([HANG], "upstream_timeout"),
        ([], "upstream_truncated"),
        ([b"data: x\n\n"], "upstream_broken"),
        ([b'data: {"choices": ['], "upstream_truncated"),
        ([b"data: " + b"x" * 20_000], "upstream_broken"),
        ([chunk("!", "stop"), chunk(" more")], "upstream_broken"),
    ],
)
def test_broken_half_way(proxy, upstream, steps, code) -> None:
    upstream.script = lambda asked: sse(FIRST, 0.1, *steps)
    reply = proxy.stream()
    assert (reply.status, reply.error, reply.is_done) == (200, code, False)
    assert "One two!".startswith(reply.text())
    assert "One" in reply.text()
    settle(proxy)


def test_an_error_in_the_stream(proxy, upstream) -> None:
    error = event({"error": {"message": "out of memory", "code": "oom"}})
    upstream.script = lambda asked: sse(FIRST, 0.1, error, DONE)
    reply = proxy.stream()
    assert error in reply.bytes
    assert reply.text() == "One"


def test_a_stream_without_done(proxy, upstream) -> None:
    """Is whole where every choice has ended."""
    upstream.script = lambda asked: sse(FIRST, chunk(None, "stop"))
    reply = proxy.stream()
    assert (reply.text(), reply.finish(), reply.is_done) == ("One two", "stop", True)
    upstream.script = lambda asked: sse(FIRST, DONE)
    reply = proxy.stream()
    assert (reply.text(), reply.finish(), reply.is_done) == ("One two", None, True)


def test_connections_are_used_again(proxy, upstream) -> None:
    upstream.script = lambda asked: sse(FIRST, chunk(None, "stop"), DONE)
    proxy.stream()
    before = upstream.num_open
    for _ in range(3):
        proxy.stream()
    assert upstream.num_open <= max(before, 1)


# -- clients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the head", "in the stream", "whole"])
def test_a_client_that_leaves(proxy, upstream, when) -> None:
    left = upstream.num_left
    steps = {"before the head": [0.3, HANG], "whole": [0.3, HANG]}.get(
        when, sse(FIRST, *[0.1, b": x\n\n"] * 50)
    )
    upstream.script = lambda asked: steps
    num_asked = len(upstream.asked)
    body = json.dumps(asking(stream=when != "whole")).encode()
    with socket.create_connection(proxy.address, timeout=10) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        if when == "in the stream":
            assert b"One" in client.recv(10_000) + client.recv(10_000)
        while len(upstream.asked) == num_asked:
            time.sleep(0.01)
    upstream.wait_until_left(left + 1)
    settle(proxy)


def test_drain(folder, upstream) -> None:
    """Replies may finish; new ones are refused."""
    go = threading.Event()

    def steps(asked: Any) -> Iterator[Any]:
        head, first, *rest = sse(FIRST, chunk(" three", "stop"), DONE)
        yield head
        yield first
        while not go.is_set():
            yield 0.01
        yield from rest

    upstream.script = steps
    with (
        proxied(folder, upstream, server={"drain_timeout_s": 20.0}) as proxy,
        proxy.http() as client,
        client.stream("POST", "/v1/chat/completions", json=asking(stream=True)) as reply,
    ):
        lines = reply.iter_bytes()
        assert b"One" in next(lines)
        proxy.loop.call_soon_threadsafe(proxy.server.drain)
        while (refused := proxy.http().post("/v1/chat/completions", json=asking())).status_code == 200:
            pass
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        go.set()
        assert b"".join(lines).endswith(DONE)


# -- a guard that fails ------------------------------------------------------------------------------------


@contextmanager
def failing(proxy: Proxied, fails_from: int) -> Iterator[None]:
    """The model fails from some step on."""
    runner, count = proxy.engine.engine.core.runner, 0
    launch = runner.launch

    def failing_launch(batch: Any) -> Any:
        nonlocal count
        count += 1
        if count > fails_from:
            raise RuntimeError("the model failed")
        return launch(batch)

    runner.launch = failing_launch
    try:
        yield
    finally:
        runner.launch = launch


@contextmanager
def hanging(proxy: Proxied) -> Iterator[threading.Event]:
    """The model hangs from `begins` on."""
    runner, begins, may_run = proxy.engine.engine.core.runner, threading.Event(), threading.Event()
    launch = runner.launch

    def hanging_launch(batch: Any) -> Any:
        if begins.is_set():
            assert may_run.wait(20)
        return launch(batch)

    runner.launch = hanging_launch
    try:
        yield begins
    finally:
        may_run.set()
        runner.launch = launch


def later(begins: threading.Event) -> Iterator[Any]:
    head, first, second, *rest = sse(FIRST, chunk(" three a bomb"), chunk(" four", "stop"), DONE)
    yield head
    yield first
    yield 0.3
    begins.set()
    yield second
    yield from rest


@pytest.mark.parametrize("is_open", [False, True])
def test_a_guard_that_fails_or_is_late(folder, upstream, is_open) -> None:
    mode = "open" if is_open else "closed"
    policy = Policy.strict(debounce=1, on_error=mode, on_timeout=mode, on_overload=mode)
    with proxied(folder, upstream, policy=policy, append_timeout_s=0.2, prompt_timeout_s=0.2) as proxy:
        proxy.stream()  # loads
        for rule, hurt in (("timeout", hanging), ("error", lambda proxy: failing(proxy, 0))):
            upstream.script = lambda asked: sse(FIRST, DONE)
            with hurt(proxy) as begins:
                if begins is not None:
                    begins.set()
                found = proxy.post({"stream": True})
                if is_open:
                    assert found.headers["x-guardengine-prompt-rule"] == f"{rule}-open"
                    assert b"two" in found.content
                else:
                    assert (found.status_code, found.json()["error"]["code"]) == (503, f"guard_{rule}")
                    assert int(found.headers["retry-after"]) >= 1
            settle(proxy)
        with hanging(proxy) as begins:
            upstream.script = lambda asked: later(begins)
            reply = proxy.stream()
            verdict = reply.verdicts["choices"][0]["verdict"]
            if is_open:
                assert (reply.text(), verdict["rule"]) == ("One two three a bomb four", "timeout-open")
            else:
                assert (reply.text(), reply.finish(), verdict["rule"]) == ("One", "content_filter", "timeout")
        settle(proxy)
        assert (
            proxy.metric(f"guardengine:proxy_{'unjudged' if is_open else 'blocks'}_total", of="prompt") == 2
        )


@pytest.mark.parametrize("is_open", [False, True])
def test_no_room(folder, upstream, is_open) -> None:
    upstream.script = lambda asked: sse(FIRST, chunk(None, "stop"), DONE)
    policy = Policy.strict(debounce=1, on_overload="open" if is_open else "closed")
    with proxied(folder, upstream, policy=policy, engine={"max_num_streams": 1}) as proxy:
        assert proxy.stream().status == 200

        async def fill() -> Any:
            return await proxy.engine.open([{"role": "user", "content": "x"}])

        held = proxy.run(fill())
        reply = proxy.stream()
        if is_open:
            assert reply.text() == "One two"
            assert reply.headers["x-guardengine-prompt-rule"] == "overload-open"
            assert reply.verdicts["choices"][0]["verdict"]["rule"] == "overload-open"
        else:
            assert (reply.status, json.loads(reply.bytes)["error"]["code"]) == (429, "overloaded")
            assert "retry-after" in reply.headers
        proxy.run(held.close())
        assert proxy.stream().status == 200


def test_texts_that_are_too_long(folder, upstream) -> None:
    words = " word" * 40
    for mode in ("closed", "open"):
        policy = Policy.strict(debounce=1, on_error=mode)
        with proxied(folder, upstream, policy=policy, engine={"max_model_len": 64}) as proxy:
            found = proxy.post({"messages": [{"role": "user", "content": words * 2}]})
            assert (found.status_code, found.json()["error"]["code"]) == (400, "context_length_exceeded")
            upstream.script = lambda asked: sse(chunk(words), 0.2, chunk(words), chunk(" end", "stop"), DONE)
            reply = proxy.stream()
            if mode == "open":
                assert (reply.text(), reply.finish()) == (words * 2 + " end", "stop")
                assert reply.verdicts["choices"][0]["verdict"]["rule"] == "error-open"
            else:
                assert reply.finish() == "content_filter"
                assert words.startswith(reply.text())
            settle(proxy)


def test_a_reader_that_is_slow(proxy, upstream) -> None:
    """The upstream is read no faster than the client reads."""
    sent = 0

    def steps(asked: Any) -> Iterator[Any]:
        nonlocal sent
        yield from sse(ends=False)
        body = event({"choices": [], "pad": "x" * 10_000})
        for _ in range(3000):
            sent += 1
            yield f"{len(body):x}\r\n".encode() + body + b"\r\n"

    upstream.script = steps
    with (
        proxy.http() as client,
        client.stream("POST", "/v1/chat/completions", json=asking(stream=True)) as reply,
    ):
        next(reply.iter_raw())
        time.sleep(0.5)
        before = sent
        time.sleep(0.3)
        assert sent == before < 3000
    settle(proxy)


def test_asyncio_leaves_nothing(proxy, upstream) -> None:
    async def tasks() -> int:
        return len(asyncio.all_tasks())

    upstream.script = lambda asked: sse(FIRST, chunk(None, "stop"), DONE)
    proxy.stream()
    time.sleep(0.2)
    before = proxy.run(tasks())
    for steps in ([HANG], [RESET], sse(FIRST, HANG), sse(chunk("a bomb"), HANG), sse(b"x"), sse(FIRST, DONE)):
        upstream.script = lambda asked, steps=steps: steps
        proxy.post({"stream": True})
    time.sleep(0.3)
    assert proxy.run(tasks()) <= before + 1
