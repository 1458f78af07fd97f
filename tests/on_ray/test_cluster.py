"""guardengine on Ray: the same answers from many processes, whichever of them is killed in the middle.

One cluster of this machine alone for all of these tests, in one process of its own: see the Makefile.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from annotating import some_rows, write_lines
from serving import REPLY, USER, sync_engine

from guardengine import Policy, errors
from guardengine.annotate.run import Options, annotate, load_engine
from guardengine.client import GuardClient
from guardengine.on_ray.annotating import Actors, judging_on

pytestmark = [pytest.mark.slow, pytest.mark.servers]

# They are read when ray is imported, by it and by the processes that it begins.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the loopback interface only
    "RAY_raylet_start_wait_time_s": "120",
}
ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")

KEY = "a-key-that-is-long-enough"
LENIENT = {"debounce": 1000, "risk_thresholds": {"Unsafe": 1.0, "Controversial": 1.0}}


def processes(of: str = "") -> dict[int, str]:
    """This process's descendants by their ids, and how they are called: those that have `of` in it."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: titles[pid] for pid in found - {os.getpid()} if of in titles.get(pid, "")}


def until(is_so: Callable[[], bool], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster, of which nothing is left in the end."""
    before = set(processes())
    ray.init(
        "local",
        num_cpus=2,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    started = set(processes()) - before
    assert len(started) > 2
    yield ray.get_runtime_context().gcs_address
    started |= set(processes()) - before
    ray.shutdown()
    until(lambda: not started & set(processes()), f"still there: {processes()}")


@pytest.fixture(scope="module")
def folder(checkpoints: Callable[..., Path]) -> Path:
    return checkpoints(dtype="float32")


# -- annotating --------------------------------------------------------------------------------------------


def meanwhile(judging: Any, events: dict[int, Callable[[], None]]) -> Any:
    """A Judging under which something happens when so many calls have been answered."""

    @contextlib.contextmanager
    def wrapped(*arguments: Any) -> Iterator[Any]:
        with judging(*arguments) as judged:

            def answers() -> Iterator[Any]:
                for number, answer in enumerate(judged, 1):
                    yield answer
                    events.get(number, lambda: None)()

            yield answers()

    return wrapped


def both(out: Path) -> tuple[bytes, bytes]:
    return out.read_bytes(), Path(f"{out}.bad.jsonl").read_bytes()


@contextlib.contextmanager
def stopping(folder: Path) -> Iterator[Any]:
    """An engine under which the command is stopped at the sixth call."""
    with load_engine(folder, Options()) as engine:
        calls = itertools.count(1)

        def moderate_many(*arguments: Any, **options: Any) -> Any:
            if next(calls) > 5:
                raise KeyboardInterrupt
            return engine.moderate_many(*arguments, **options)

        yield SimpleNamespace(moderate_many=moderate_many)


def test_nothing_is_lost_or_written_twice_when_the_command_and_then_an_actor_are_killed(
    cluster: str, folder: Path, tmp_path: Path
) -> None:
    source, options = write_lines(tmp_path / "in.jsonl", some_rows(200)), Options(window_rows=8)
    out, alone = tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    annotate(source, alone, folder, options)
    with pytest.raises(KeyboardInterrupt):
        annotate(source, out, folder, options, load=stopping)
    assert not out.exists()

    def kill() -> None:
        os.kill(min(processes("MapWorker")), signal.SIGKILL)  # with calls that it has not answered

    judging = judging_on(Actors(num_actors=2, num_cpus=1), str(folder), options)
    report = annotate(source, out, folder, options, judging=meanwhile(judging, {3: kill}))
    assert 10 < report.num_resumed < 100  # the journal is the same, whoever judges
    assert (report.num_rows, report.num_bad) == (200, 3)
    assert both(out) == both(alone)


def test_an_actors_error_is_raised_here_by_name(cluster: str, folder: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", some_rows(60))
    judging = judging_on(Actors(num_actors=1), str(tmp_path / "elsewhere"), Options())
    with pytest.raises(errors.CheckpointError, match="elsewhere: no such folder"):
        annotate(source, tmp_path / "out.jsonl", folder, judging=judging)
    assert not (tmp_path / "out.jsonl").exists()


# -- serving -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(cluster: str, folder: Path) -> Iterator[str]:
    """One replica, and another one under load, begun by the command."""
    command = [sys.executable, "-P", "-m", "guardengine", "ray-serve", str(folder), "--replicas", "1..2"]
    command += ["--port", "0", "--kv-cache-bytes", str(2**25), "--drain-timeout-s", "1"]
    command += ["--target-lag-ms", "0.001", "--upscale-delay-s", "0"]
    environment = os.environ | {"RAY_ADDRESS": cluster, "GUARDENGINE_API_KEYS": KEY}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = next((line for line in server.stdout if line.startswith("guardengine serves")), "")
            assert line.endswith("with 1..2 replicas\n")
            yield line.split()[4].rstrip(",")
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
            assert not processes("ServeReplica")
        finally:
            server.kill()


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[Any]:
    with sync_engine(folder) as engine:
        stream = engine.open([USER], policy=Policy.strict(**LENIENT))
        stream.append_text(REPLY, is_final=True)
        engine.run()
        return [(x.position, x.token_id, x.risk_probs, stream.span(x)._asdict()) for x in stream.labels]


def running_replicas() -> int:
    application = serve.status().applications["guardengine"]
    return application.deployments["Guard"].replica_states.get("RUNNING", 0)


def test_replicas_come_where_engines_lag(url: str) -> None:
    assert len(processes("ServeReplica")) == 1
    with GuardClient(url, api_key="another-key-that-is-long") as stranger:
        with pytest.raises(errors.ServerError, match="401"):
            stranger.moderations("x")
        with pytest.raises(errors.ServerError, match="key"):
            stranger.stream([USER])
    with GuardClient(url, api_key=KEY) as client, pytest.raises(errors.StreamTooLong):
        client.moderations("a " * 9000)
    # Several at a time, so that some wait for the engine whenever a replica is asked how long they do.
    with ThreadPoolExecutor(4) as pool:
        is_enough = threading.Event()
        loads = [pool.submit(moderate_until, is_enough, url) for _ in range(4)]
        try:
            until(lambda: len(processes("ServeReplica")) == 2, "there is one replica still", 120)
        finally:
            is_enough.set()
        assert all(load.result() for load in loads)


def moderate_until(is_enough: threading.Event, url: str) -> int:
    """Ask for moderations until it is enough; how many were answered."""
    num_answered = 0
    with GuardClient(url, api_key=KEY) as client:
        while not is_enough.is_set():
            assert len(client.moderations(["word " * 400] * 8)) == 8
            num_answered += 8
    return num_answered


def test_streams_go_on_elsewhere_when_their_replica_is_killed(url: str, whole: list[Any]) -> None:
    until(lambda: running_replicas() == 2, "there is one replica still")
    with GuardClient(url, api_key=KEY, reconnect_s=60) as client:
        streams = [client.stream([USER], policy=LENIENT) for _ in range(4)]
        sockets = [stream._socket for stream in streams]
        for at, char in enumerate(REPLY):
            if at == 20:
                os.kill(min(processes("ServeReplica")), signal.SIGKILL)
            for stream in streams:
                stream.append(char)
        for stream in streams:
            stream.finish()
            found = [(x["position"], x["token_id"], x["risk_probs"], x["span"]) for x in stream.labels]
            assert found == whole
            stream.close()
        assert [stream._socket for stream in streams] != sockets
