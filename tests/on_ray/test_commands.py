"""What runs on Ray, without a cluster: what is handed to it, how many replicas are wanted, what is refused."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from annotating import some_rows, write_lines

from guardengine import ConfigError, errors
from guardengine.annotate.calls import Rows
from guardengine.annotate.jsonl_out import Columns
from guardengine.annotate.layout import Layout
from guardengine.annotate.rows import JsonlSource
from guardengine.annotate.run import Options
from guardengine.annotate.tables import TableSource
from guardengine.cli import main
from guardengine.cli.ray_serve import application
from guardengine.on_ray import cluster as clusters
from guardengine.on_ray.annotating import Actors
from guardengine.on_ray.lag import LAG, LagPolicy
from guardengine.on_ray.scale import Scale, read_range

pytestmark = [pytest.mark.slow, pytest.mark.servers]

ray, cloudpickle = pytest.importorskip("ray"), pytest.importorskip("ray.cloudpickle")


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


def test_nodes_must_have_the_same_release_and_checkpoint(folder: Path) -> None:
    from guardengine._version import __version__
    from guardengine.on_ray.pipeline import _Judge

    with pytest.raises(ConfigError, match=r"guardengine .* and this command has 0\.0\.1"):
        _Judge(str(folder), Options(), "", "0.0.1")
    with pytest.raises(errors.CheckpointError, match="another checkpoint on node"):
        _Judge(str(folder), Options(), "0" * 64, __version__)


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
    with pytest.raises(ConfigError, match=r"--threads 9: .* give at most 8"):
        Actors(num_cpus=9).fitted(nodes)
    with pytest.raises(ConfigError, match=r"--ray-gpus 2: .* give at most 1"):
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
        assert "pip install '.[ray]'" in refused(*command)


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
    assert isinstance(found := clusters.named(text, "failed"), errors.CheckpointError)
    assert str(found) == "/x: no such folder"
    assert str(clusters.named("a\nb\n", "failed")) == "failed (b)"
