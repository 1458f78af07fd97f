"""What a connection leaves behind when it has ended: nothing that waits for the garbage collector, which a server of
many streams runs rarely."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from serving import REPLY, USER, Channel, Served, channel, served

from guardengine.labels import Label
from guardengine.server import ServerSettings

pytestmark = pytest.mark.servers

# What makes up a connection and its streams, labels with them.
PARTS = ("StreamState", "AsyncStream", "StreamSession", "Connection", "Append", "Protocol", "_CutOffProtocol")


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Served]:
    with served(
        folder, ServerSettings(drain_timeout_s=2.0), max_model_len=256, prefix_caching=False
    ) as server:
        yield server


@pytest.fixture(autouse=True)
def uncollected(server) -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what other tests keep is not counted
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def parts() -> Counter[str]:
    kinds = (type(found) for found in gc.get_objects())
    ours = (kind for kind in kinds if str(kind.__module__).startswith("guardengine."))
    names = (kind.__qualname__.rpartition(".")[2] for kind in ours)
    return Counter(name for name in names if name in PARTS)


def wait_until_gone(server: Served, names: tuple[str, ...] = PARTS) -> None:
    until = time.monotonic() + 10
    while True:
        server.run(server.engine.stats())  # the engine's thread holds what it was told last
        left = {name: count for name, count in parts().items() if name in names}
        if not left or time.monotonic() > until:
            break
        time.sleep(0.05)
    assert not left


def reply(c: Channel, stream: str) -> None:
    c.open(stream)
    c.send("append", stream, text=REPLY)
    c.until("labels", stream=stream, appends=1)


def test_streams_that_are_closed(server) -> None:
    with channel(server) as c:
        reply(c, "s")
        c.send("finish", "s")
        c.until("finished")
        c.send("fork", "s", new_stream="t")
        c.until("forked")
        for name in ("s", "t"):
            c.send("close", name)
            c.until("closed", stream=name)
        wait_until_gone(server, ("StreamState", "AsyncStream", "StreamSession"))  # before the connection ends
    wait_until_gone(server)


def test_a_connection_that_is_closed_with_streams_open(server) -> None:
    with channel(server) as c:
        reply(c, "s")
        reply(c, "t")
        assert parts()["StreamState"] == 2
    wait_until_gone(server)


def test_a_client_that_is_killed(server) -> None:
    with channel(server) as c:
        reply(c, "s")
        c.send("append", text=REPLY)
        c.socket.socket.shutdown(socket.SHUT_RDWR)
        wait_until_gone(server)


def test_appends_that_were_not_judged_in_time(server) -> None:
    async def miss() -> list[list[Label]]:
        engine = server.engine
        async with await engine.open([USER]) as stream:
            await stream.prompt()
            busy = asyncio.create_task(engine.calls.call(lambda: time.sleep(0.3)))
            await asyncio.sleep(0)
            found = await asyncio.gather(*(stream.append([8420], timeout_s=0.01) for _ in range(3)))
            await busy
            return found

    assert server.run(miss()) == [[], [], []]
    wait_until_gone(server)


def test_requests(server) -> None:
    with server.http() as http:
        talk = [USER, {"role": "assistant", "content": REPLY}]
        http.post("/v1/guard", json={"messages": talk}).raise_for_status()
        http.post("/v1/moderations", json={"input": REPLY}).raise_for_status()
    wait_until_gone(server)
