"""Who may call, how much, how slowly, and how it ends: keys, sizes, times, overload, drain, settings."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import websockets
from serving import USER, Channel, Served, channel, served
from websockets.sync.client import connect

from guardengine import ConfigError, Policy
from guardengine.server import ApiKey, ServerSettings, create_app
from guardengine.server.drain import Drain
from guardengine.server.settings import read_api_keys

pytestmark = [pytest.mark.slow, pytest.mark.servers]

KEY, OTHER = "a-key-of-twenty-chars", "another-key-of-twenty"


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Served]:
    limits = ServerSettings(
        api_keys=(ApiKey.of(KEY, "alice"), ApiKey.of(OTHER)),
        max_body_bytes=10_000,
        body_timeout_s=0.5,
        header_timeout_s=0.5,
        max_requests=2,
        drain_timeout_s=2.0,
    )
    with served(folder, limits, max_streams_per_tenant=3) as server:
        server.headers = bearer(KEY)
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# -- keys --------------------------------------------------------------------------------------------------


def test_everything_but_health_and_the_playgrounds_page_needs_a_key(server) -> None:
    with server.http() as http:
        paths = http.get("/openapi.json", headers=bearer(KEY)).json()["paths"]
        for path in [
            *paths,
            "/docs",
            "/openapi.json",
            "/nothing/here",
            "/v1/models/x",
            "/health/",
            "//health",
        ]:
            for method in ("GET", "POST"):
                # As it is: relative to a base URL, //health would be a host.
                response = http.request(method, httpx.URL(server.url, raw_path=path.encode()))
                if path in ("/health", "/ready"):
                    assert response.status_code in (200, 405)
                    continue
                assert response.status_code == 401, path
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer \xff\xfe"],
)
def test_wrong_keys_are_refused(server, header) -> None:
    headers = {"Authorization": header.encode("latin-1")}
    with server.http() as http:
        assert http.get("/v1/models", headers=headers).status_code == 401
    with pytest.raises(websockets.InvalidStatus) as refused:
        server.socket(additional_headers={"Authorization": header} if header.isascii() else {})
    assert refused.value.response.status_code == 401


def test_right_keys_are_not(server) -> None:
    with server.http() as http:
        for key in (KEY, OTHER):
            assert http.get("/v1/models", headers=bearer(key)).status_code == 200
        assert http.get("/v1/models", headers={"authorization": f"bearer  {KEY}"}).status_code == 200
    with channel(server, additional_headers=bearer(KEY)) as c:
        c.open()
    with server.socket(subprotocols=["guardengine.v1", f"guardengine.key.{KEY}"]) as page:
        assert page.subprotocol == "guardengine.v1"


def test_a_key_is_a_tenant(server) -> None:
    with channel(server, additional_headers=bearer(KEY)) as c:
        for index in range(3):
            c.open(f"s{index}")
        c.send("open", "s3", messages=[USER])
        assert c.until("error")["error"]["code"] == "overloaded"
        with channel(server, additional_headers=bearer(OTHER)) as other:
            other.open()
        with server.http(headers=bearer(KEY)) as http:
            full = http.post("/v1/guard", json={"messages": [USER]})
            assert (full.status_code, full.json()["error"]["code"]) == (429, "overloaded")
            assert int(full.headers["Retry-After"]) >= 1
        with server.http(headers=bearer(OTHER)) as http:
            assert http.post("/v1/guard", json={"messages": [USER]}).status_code == 200


def test_a_batch_waits_for_its_own_room(server) -> None:
    with server.http(headers=bearer(OTHER)) as http:
        response = http.post("/v1/moderations", json={"input": [f"text {i}" for i in range(20)]})
        assert len(response.json()["results"]) == 20


# -- sizes and times ---------------------------------------------------------------------------------------


def test_large_bodies_are_refused_by_their_header_and_by_their_bytes(server) -> None:
    body = b'{"input": "' + b"x" * 20_000 + b'"}'
    headers = bearer(KEY) | {"content-type": "application/json"}
    with server.http(headers=headers) as http:
        by_header = http.post("/v1/moderations", content=body)
        by_bytes = http.post("/v1/moderations", content=iter([body[:6000], body[6000:]]))
    for response in (by_header, by_bytes):
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def raw(server: Served) -> socket.socket:
    return socket.create_connection(server.address, timeout=10)


def test_headers_that_do_not_come_end_the_connection(server) -> None:
    began = time.monotonic()
    for start in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: "):
        with raw(server) as slow:
            slow.sendall(start)
            with contextlib.suppress(ConnectionResetError):
                assert slow.recv(100) == b""
    assert 0.8 < time.monotonic() - began < 6


def test_dripping_headers_do_not_help(server) -> None:
    with raw(server) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in slow.recv(4096)
        slow.sendall(b"GET /health HTTP/1.1\r\n")  # the second on the same connection
        with pytest.raises(OSError):  # noqa: PT012
            for index in range(40):
                slow.sendall(b"X-%d: y\r\n" % index)
                time.sleep(0.1)


def test_a_body_that_does_not_come_is_given_up(server) -> None:
    with raw(server) as slow:
        slow.sendall(
            b"POST /v1/moderations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
            + f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n\r\n".encode()
        )
        slow.sendall(b'{"input')
        assert b" 408 " in slow.recv(4096)


def test_too_many_requests_are_refused_at_once_and_those_that_hang_up_are_dropped(server) -> None:
    service = server.service
    engine, entered, cancelled = service.stream, threading.Event(), threading.Event()

    class Hanging:
        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        async def moderate_many(self, *_: Any, **__: Any) -> Any:
            entered.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.set()
                raise

    service.stream = Hanging()
    try:
        with server.http(headers=bearer(KEY)) as http:
            threads = [threading.Thread(target=lambda: hang_up(server), daemon=True) for _ in range(2)]
            for thread in threads:
                thread.start()
            assert entered.wait(10)
            while server.service.metrics.requests_running._value.get() < 2:
                time.sleep(0.01)
            full = http.post("/v1/moderations", json={"input": "x"})
            assert (full.status_code, full.json()["error"]["code"]) == (429, "overloaded")
            assert http.get("/health").status_code == 200  # never refused for load
            for thread in threads:
                thread.join(10)
            assert cancelled.wait(10)
    finally:
        service.stream = engine
    with server.http(headers=bearer(KEY)) as http:
        assert http.post("/v1/moderations", json={"input": "x"}).status_code == 200


def hang_up(server: Served) -> None:
    with server.http(headers=bearer(KEY)) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/moderations", json={"input": "x"}, timeout=1.5)


def test_an_answer_that_takes_too_long_is_a_504(folder) -> None:
    with (
        served(
            folder, ServerSettings(request_timeout_s=0.3, health_timeout_s=0.2, drain_timeout_s=1)
        ) as server,
        server.http() as http,
    ):
        runner = server.engine.engine.core.runner
        launch, may_run = runner.launch, threading.Event()

        def wait(batch: Any) -> Any:
            assert may_run.wait(20)
            return launch(batch)

        runner.launch = wait
        late = http.post("/v1/moderations", json={"input": "x"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        assert http.post("/v1/guard", json={"messages": [USER], "timeout_s": 0.1}).status_code == 504
        stalled = http.get("/health")
        assert (stalled.status_code, stalled.json()["models"]["qwen3guard-stream"]["status"]) == (
            503,
            "stalled",
        )
        may_run.set()
        assert http.post("/v1/moderations", json={"input": "y"}).status_code == 200


def test_pages_may_call_where_that_is_allowed(folder, server) -> None:
    origin = {"Origin": "https://app.example"}
    with server.http(headers=bearer(KEY)) as http:
        assert "access-control-allow-origin" not in http.get("/v1/models", headers=origin).headers
    settings = ServerSettings(cors_origins=("https://app.example",), api_keys=(ApiKey.of(KEY),))
    with served(folder, settings) as allowed, allowed.http() as http:
        preflight = http.options("/v1/guard", headers=origin | {"Access-Control-Request-Method": "POST"})
        assert preflight.status_code == 200
        found = http.get("/v1/models", headers=origin | bearer(KEY))
        assert found.headers["access-control-allow-origin"] == "https://app.example"
        with channel(allowed, origin="https://app.example", additional_headers=bearer(KEY)):
            pass


# -- the end -----------------------------------------------------------------------------------------------


@pytest.fixture
def process(folder, tmp_path) -> Iterator[Any]:
    """`guardengine serve` as it is started from a shell."""
    (tmp_path / "keys").write_text(f"# staff\nalice {KEY}\n")
    command = [
        sys.executable,
        "-P",
        "-m",
        "guardengine",
        "serve",
        str(folder),
        "--port",
        "0",
        "--num-threads",
        "1",
    ]
    command += [
        "--kv-cache-bytes",
        str(2**25),
        "--drain-timeout-s",
        "8",
        "--api-key-file",
        str(tmp_path / "keys"),
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "log").open("w"),
        text=True,
        env=os.environ | {"GUARDENGINE_API_KEYS": OTHER},
    ) as process:
        line = process.stdout.readline()
        assert "guardengine serves qwen3guard-stream on http://127.0.0.1:" in line, (
            tmp_path / "log"
        ).read_text()
        try:
            yield process, line.rpartition(" ")[2].strip(), tmp_path / "log"
        finally:
            process.kill()


def test_sigterm_lets_streams_finish_and_refuses_new_work(process) -> None:
    running, url, log = process
    with (
        httpx.Client(base_url=url, headers=bearer(OTHER), timeout=20) as http,
        connect(
            f"{url.replace('http', 'ws')}/v1/guard/stream", additional_headers=bearer(KEY), max_queue=None
        ) as ws,
    ):
        c = Channel(ws)
        c.open("going on")
        c.open("not finished")
        c.send("append", "going on", text="Some text, which ")
        c.until("labels", stream="going on", appends=1)
        running.send_signal(signal.SIGTERM)
        assert 0 < c.until("draining")["deadline_s"] <= 8
        refused = http.post("/v1/moderations", json={"input": "Xylophonesecret"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["Retry-After"]) >= 1
        assert http.get("/ready").status_code == 503
        assert http.get("/health").status_code == 200
        with pytest.raises(websockets.InvalidStatus) as turned_away:
            connect(f"{url.replace('http', 'ws')}/v1/guard/stream", additional_headers=bearer(KEY))
        assert turned_away.value.response.status_code == 503
        c.send("open", "new", messages=[USER])
        assert c.until("error", stream="new")["error"]["code"] == "draining"
        c.send("append", "going on", text="goes on to its end.")
        c.send("finish", "going on")
        assert c.until("finished", stream="going on")["labels"]
        assert c.until("closed", stream="going on")["reason"] == "draining"
        assert running.poll() is None
        c.send("finish", "not finished")
        c.until("closed", stream="not finished")
        with pytest.raises(websockets.ConnectionClosed):
            c.until("never")
        assert ws.close_code in (1001, 1012)
    assert running.wait(15) == 0
    written = log.read_text()
    assert "draining" in written
    for secret in ("Xylophonesecret", "goes on", KEY, OTHER):
        assert secret not in written


def test_a_second_signal_ends_at_once(process) -> None:
    running, url, _ = process
    with connect(f"{url.replace('http', 'ws')}/v1/guard/stream", additional_headers=bearer(KEY)) as ws:
        c = Channel(ws)
        c.open()
        running.send_signal(signal.SIGTERM)
        c.until("draining")
        began = time.monotonic()
        running.send_signal(signal.SIGTERM)
        running.wait(15)
        assert time.monotonic() - began < 7


def test_drain_waits_no_longer_than_its_deadline() -> None:
    async def main() -> None:
        drain, told = Drain(0.1), []
        with drain.listen(lambda: told.append(1)), drain.work():
            drain.begin()
            drain.begin()
            assert not await drain.until_quiet()
        assert told == [1]
        assert await drain.until_quiet()

    asyncio.run(main())


# -- settings ----------------------------------------------------------------------------------------------


def test_keys_are_read_from_files_and_the_environment(tmp_path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"\n# comment\nalice {KEY}\n{OTHER}\n")
    keys = read_api_keys(file, {"GUARDENGINE_API_KEYS": " a-third-key-of-twenty , "})
    assert keys[0].name == "alice"
    assert len(keys) == 3
    assert KEY.encode() not in repr(keys).encode()
    assert read_api_keys(None, {}) == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing",
        "short",
        f"a b {KEY}",
        f"al!ce {KEY}",
        f"{KEY}\n{KEY}",
        f"a {KEY}\na {OTHER}",
        KEY + "é",
    ],
)
def test_bad_key_files_are_refused_without_their_keys(tmp_path, text) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_api_keys(file, {})
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    "options",
    [
        {"max_inputs": 0},
        {"max_body_bytes": True},
        {"max_requests": 1.5},
        {"drain_timeout_s": 0},
        {"request_timeout_s": float("nan")},
        {"taxonomy": "x"},
        {"gen_mode": "x"},
        {"policy": "strict"},
        {"model_name": ""},
        {"model_name": "qwen3guard-gen"},
        {"api_keys": ("secret",)},
        {"cors_origins": "https://x"},
    ],
)
def test_settings_are_checked(options) -> None:
    with pytest.raises(ConfigError):
        ServerSettings(**options)
    assert ServerSettings(policy=Policy.loose(), max_inputs=1).max_inputs == 1


def test_an_app_needs_an_engine() -> None:
    with pytest.raises(ConfigError):
        create_app()


def test_what_cannot_be_served_is_said(folder, checkpoints, tmp_path, capfd, monkeypatch) -> None:
    from guardengine.cli import main

    monkeypatch.setattr("guardengine.server.serve.log_to_stderr", lambda level: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments, text in (
            ([str(tmp_path / "none")], "no such folder"),
            ([str(folder), "--api-key-file", str(tmp_path / "none")], "cannot be read"),
            ([str(folder), "--gen", str(folder)], "is a Stream checkpoint"),
            ([str(folder), "--max-inputs", "0"], "max_inputs"),
            ([str(folder), "--port", str(taken.getsockname()[1]), "--num-threads", "1"], "cannot listen"),
        ):
            assert main(["serve", *arguments]) == 2
            assert text in capfd.readouterr().err
