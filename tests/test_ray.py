"""guardengine on Ray: the same answers from many processes, whichever of them is killed in the middle.

One cluster for all of these tests, of this machine alone: they run in one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from annotating import write_lines
from serving import REPLY, USER, sync_engine

from guardengine import ConfigError, Policy, errors
from guardengine.annotate.assembly import Columns
from guardengine.annotate.calls import Rows
from guardengine.annotate.layout import Layout
from guardengine.annotate.rows import JsonlSource
from guardengine.annotate.run import Options, annotate
from guardengine.annotate.tables import TableSource
from guardengine.cli import main
from guardengine.client import GuardClient
from guardengine.on_ray import cluster as clusters
from guardengine.on_ray.annotating import Actors, judging_on
from guardengine.on_ray.command import application
from guardengine.on_ray.lag import LAG, LagPolicy
from guardengine.on_ray.scale import Scale, read_range

# They are read when ray is imported, by it and by the processes that it begins.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the loopback interface only
    "RAY_raylet_start_wait_time_s": "120",
}
ray = pytest.importorskip("ray")
serve, cloudpickle = pytest.importorskip("ray.serve"), pytest.importorskip("ray.cloudpickle")
pytestmark = pytest.mark.xdist_group("ray")

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


def some_rows(count: int) -> list[Any]:
    rows: list[Any] = [
        {
            "id": i,
            "prompt": f"number {i}: " + "word " * (7 * i % 60),
            "response": "réponse 巴黎 " * (i % 40 + 1),
        }
        for i in range(count)
    ]
    rows[5] = {"id": 5, "prompt": 5, "response": "a number"}
    rows[17] = b"{not JSON"
    rows[40] = {"id": 40, "prompt": "a\ud800b", "response": "lone"}
    return rows


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


def test_nothing_is_lost_or_written_twice_when_an_actor_and_then_the_command_are_killed(
    cluster: str, folder: Path, tmp_path: Path
) -> None:
    source, options = write_lines(tmp_path / "in.jsonl", some_rows(300)), Options(window_rows=8)
    annotate(source, tmp_path / "alone.jsonl", folder, options)
    judging, out = judging_on(Actors(num_actors=2, num_cpus=1), str(folder), options), tmp_path / "out.jsonl"
    killed: list[int] = []

    def kill_an_actor() -> None:
        killed.append(min(processes("MapWorker")))
        os.kill(killed[0], signal.SIGKILL)

    def stop() -> None:
        assert killed[0] not in processes("MapWorker")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        annotate(source, out, folder, options, judging=meanwhile(judging, {4: kill_an_actor, 40: stop}))
    assert not out.exists()
    report = annotate(source, out, folder, options, judging=judging)
    assert 100 < report.num_resumed < 300
    assert (report.num_rows, report.num_bad) == (300, 3)
    assert both(out) == both(tmp_path / "alone.jsonl")


def test_calls_are_the_same_in_another_process(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [row for row in some_rows(60) if isinstance(row, dict) and row["id"] not in (5, 40)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    sources = TableSource([tmp_path / "in.parquet"]), JsonlSource([write_lines(tmp_path / "in.jsonl", rows)])
    for source in sources:
        is_done = np.arange(len(rows)) % 3 == 0
        there = Rows(source, Layout("prompt", "response"), Columns.with_prefix("g_"), len(rows), 16, is_done)
        calls = list(there.calls())
        assert sorted(row for call in calls for row, _ in call) == [
            row for row in range(len(rows)) if row % 3
        ]
        assert list(cloudpickle.loads(cloudpickle.dumps(there)).calls()) == calls


def test_an_actors_error_is_raised_here_by_name(cluster: str, folder: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", some_rows(60))
    judging = judging_on(Actors(num_actors=1), str(tmp_path / "elsewhere"), Options())
    with pytest.raises(errors.CheckpointError, match="elsewhere: no such folder"):
        annotate(source, tmp_path / "out.jsonl", folder, judging=judging)
    assert not (tmp_path / "out.jsonl").exists()


def test_nodes_must_have_the_same_release_and_checkpoint(folder: Path) -> None:
    from guardengine._version import __version__
    from guardengine.on_ray.pipeline import _Judge

    with pytest.raises(ConfigError, match=r"guardengine .* and this command is of 0\.0\.1"):
        _Judge(str(folder), Options(), "", "0.0.1")
    with pytest.raises(errors.CheckpointError, match="another checkpoint on node"):
        _Judge(str(folder), Options(), "0" * 64, __version__)


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
    with GuardClient(url, api_key=KEY) as client:
        with pytest.raises(errors.StreamTooLong):
            client.moderations("a " * 9000)
        deadline = time.monotonic() + 120
        while len(processes("ServeReplica")) < 2:
            assert time.monotonic() < deadline, "there is one replica still"
            assert len(client.moderations(["word " * 400] * 8)) == 8


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


def context(lags: dict[str, float], current: int, wanted: int) -> Any:
    return SimpleNamespace(
        aggregated_metrics={LAG: lags}, current_num_replicas=current, target_num_replicas=wanted
    )


@pytest.mark.parametrize(
    ("lags", "current", "wanted", "expected"),
    [
        ([0.6, 0.6], 2, 2, 3),
        ([9.0, 0.0], 2, 2, 4),  # no more than twice as many at a time
        ([0.9, 0.8], 2, 4, 4),  # two are on their way
        ([0.3, 0.3], 2, 2, 2),
        ([0.3, 0.0], 2, 2, 2),
        ([0.1, 0.0], 2, 2, 1),
        ([], 0, 2, 2),
    ],
)
def test_the_policy(lags: list[float], current: int, wanted: int, expected: int) -> None:
    found = context({str(index): lag for index, lag in enumerate(lags)}, current, wanted)
    assert LagPolicy(target_lag_s=0.5)(found) == (expected, {})


def test_a_replica_whose_engine_hangs_is_unwell() -> None:
    from guardengine.on_ray.serving import Guard, Served

    class Engine:
        status = "ok"

        async def health(self, timeout_s: float) -> dict[str, Any]:
            return {"status": self.status, "note": "a step hangs"}

        async def stats(self) -> dict[str, Any]:
            return {"lag_s": 2.5}

    replica = SimpleNamespace(_engines={"stream": Engine()}, _served=Served(checkpoint="x"))
    kind = Guard.func_or_class
    asyncio.run(kind.check_health(replica))
    Engine.status = "stalled"
    with pytest.raises(errors.ServerError, match="the stream engine is stalled: a step hangs"):
        asyncio.run(kind.check_health(replica))
    assert asyncio.run(kind.record_autoscaling_stats(replica)) == {LAG: 2.5}


# -- what is wrong is said by name -------------------------------------------------------------------------


def scale_of(text: str) -> Scale:
    least, most = read_range(text)
    return Scale(least=least, most=most)


@pytest.mark.parametrize("text", ["", "0", "3..2", "1..", "-1", "a", "1...2", "0..4"])
def test_ranges_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--replicas"):
        scale_of(text)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_cpus": 0}, "--cpus 0"),
        ({"num_gpus": 1.5}, "--gpus 1.5"),
        ({"num_gpus": -1}, "--gpus -1"),
        ({"target_lag_ms": 0}, "--target-lag-ms 0"),
        ({"downscale_delay_s": float("nan")}, "--downscale-delay-s nan"),
    ],
)
def test_scales_that_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Scale(**options)


def test_actors_fit_the_cluster() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": cpus, "GPU": 1.0}} for cpus in (8.0, 4.0)]
    nodes += [{"Alive": False, "Resources": {"CPU": 64.0}}, {"Alive": True, "Resources": {}}]
    fitted = Actors().fitted(nodes)
    assert (fitted.num_actors, fitted.num_cpus) == (2, 4)
    assert Actors(num_actors=5).fitted(nodes).num_cpus == 1
    assert Actors(num_actors=3).fitted(nodes).num_cpus == 2
    with pytest.raises(ConfigError, match=r"--threads 9: .* the most is 8"):
        Actors(num_cpus=9).fitted(nodes)
    with pytest.raises(ConfigError, match=r"--ray-gpus 2: .* the most is 1"):
        Actors(num_gpus=2).fitted(nodes)
    for option in ({"num_actors": 0}, {"num_cpus": 0}, {"num_gpus": -1}):
        with pytest.raises(ConfigError, match="from"):
            Actors(**option)


def test_commands_that_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    source = write_lines(tmp_path / "in.jsonl", some_rows(60))
    annotation = ["annotate", source, tmp_path / "out.jsonl", "--checkpoint", folder]
    assert "give that too" in refused(*annotation, "--ray-actors", 2)
    assert "MIN..MAX" in refused("ray-serve", folder, "--replicas", "many")
    assert "no such folder" in refused("ray-serve", tmp_path / "nowhere")
    assert "is a Stream checkpoint" in refused("ray-serve", folder, "--gen", folder)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert "as HOST:PORT or auto" in refused("ray-serve", folder, "--ray-address", "ray://head:10001")
    monkeypatch.setattr(
        ray, "init", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("nobody there\nmore"))
    )
    assert "no Ray cluster at 10.0.0.1:6379 (nobody there)" in refused(
        *annotation, "--ray", "--ray-address", "10.0.0.1:6379"
    )
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in (["ray-serve", folder], [*annotation, "--ray"]):
        assert "pip install 'guardengine[ray]'" in refused(*command)


def test_rays_config_files_take_the_commands_options(folder: Path) -> None:
    built = application({"options": f"{folder} --replicas 2..5 --cpus 2 --target-lag-ms 100"})
    deployment = built._bound_deployment
    assert deployment.ray_actor_options == {"num_cpus": 2, "num_gpus": 0}
    assert deployment._deployment_config.autoscaling_config.max_replicas == 5
    assert deployment.max_ongoing_requests == 4096
    for wrong in ({}, {"options": 3}, {"options": ""}, {"options": f"{folder} --nonsense 3"}):
        with pytest.raises(ConfigError, match="options"):
            application(wrong)  # type: ignore[arg-type]


def test_rays_errors_are_said_by_name() -> None:
    text = "ray::Judge()\n  File x\nguardengine.errors.CheckpointError: /x: no such folder"
    assert isinstance(found := clusters.named(RuntimeError(text), "failed"), errors.CheckpointError)
    assert str(found) == "/x: no such folder"
    assert str(clusters.named(RuntimeError("a\nb"), "failed")) == "failed (b)"
