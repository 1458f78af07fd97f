"""The benchmark: workloads are reproducible, the floor is right, wrong labels are not timed, records are complete."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guardengine import Engine
from guardengine.bench import checkpoints as bench_checkpoints
from guardengine.bench import compare, plot, report, throughput
from guardengine.bench.__main__ import main
from guardengine.bench.check import check_labels
from guardengine.bench.floor import CostModel, Limits
from guardengine.bench.hf import HFGuard
from guardengine.bench.workload import Point, poisson_arrivals
from guardengine.checkpoint.model_config import ModelConfig
from guardengine.errors import ConfigError, IntegrityError, LabelsDiffer
from guardengine.measuring import machine
from guardengine.measuring.random_ids import random_ids

CEILINGS = machine.Ceilings(1, 10e9, 9e9, 2**20, 200e9, 100e9, 0.0, "none")
LIMITS = {"kv_cache_bytes": 2**22, "max_model_len": 512}


@pytest.fixture(autouse=True)
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real probe takes a second and much memory; it has tests of its own."""
    monkeypatch.setattr(machine, "probe_ceilings", lambda num_threads: CEILINGS)


@pytest.fixture
def cost(tiny: Path) -> CostModel:
    return CostModel(ModelConfig.from_dict(json.loads((tiny / "config.json").read_text())), 4, 4)


@pytest.fixture
def measure(engine: Engine, cost: CostModel) -> Callable[..., Any]:
    def measure(point: Point, **options: Any) -> Any:
        progress: Callable[[int], object] = lambda count: None  # noqa: E731
        return throughput.measure_point(
            engine, point, cost, vocab_size=512, seed=0, progress=progress, **options
        )

    return measure


# -- the workload -------------------------------------------------------------------------------------------


def test_poisson_schedule_is_reproducible_and_complete() -> None:
    point = Point(5, 8, 100, k=3, arrival="poisson", rate=20.0)
    arrivals = poisson_arrivals(point, seed=4)
    assert arrivals == poisson_arrivals(point, seed=4)
    assert arrivals != poisson_arrivals(point, seed=5)
    assert arrivals == sorted(arrivals)
    for stream in range(5):
        own = [arrival for arrival in arrivals if arrival.stream == stream]
        fed = [i for arrival in own for i in range(arrival.first, arrival.first + arrival.num_tokens)]
        assert fed == list(range(100))  # in order, each token once


def test_poisson_schedule_has_the_asked_rate() -> None:
    arrivals = poisson_arrivals(Point(20, 8, 500, k=2, arrival="poisson", rate=40.0), seed=0)
    ends = [max(a.due_s for a in arrivals if a.stream == stream) for stream in range(20)]
    assert np.mean(ends) == pytest.approx(500 / 40, rel=0.05)
    gaps = np.diff([0.0, *(a.due_s for a in arrivals if a.stream == 0)])
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.3)  # exponential, not regular


def test_random_ids_are_reproducible_and_in_range() -> None:
    ids = random_ids(3, 50, 512, seed=1)
    assert ids == random_ids(3, 50, 512, seed=1) != random_ids(3, 50, 512, seed=2)
    assert max(map(max, ids)) < 512
    assert max(map(max, random_ids(2, 5000, 151936, seed=1))) < 151643  # content, no control tokens


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_streams": 0}, "num_streams=0"), ({"rate": 0.0}, "rate=0.0"), ({"arrival": "all"}, "lockstep")],
)
def test_impossible_points_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Point(**{"num_streams": 1, "prompt_len": 1, "response_len": 1} | fields)


# -- the floor ----------------------------------------------------------------------------------------------


def test_floor_counts_what_a_step_needs(cost: CostModel) -> None:
    """By hand: hidden 64, 3 layers, 4 heads and 2 kv heads of 32, intermediate 128, inner 32, 23 logits."""
    qkv, rest = 64 * (128 + 2 * 64), 128 * 64 + 3 * 64 * 128
    heads = 2 * 64 * 32 + 32 * 23
    one = cost.of_tokens([[9]])
    assert one.num_bytes == 4 * (3 * (qkv + rest) + heads + 64) + 10 * (2 * 3 * 2 * 32) * 4
    assert one.flops == 2 * (3 * (qkv + rest) + heads) + 3 * 4 * 128 * 10
    # Two streams share the weights, not the cache; several tokens of one stream share its cache.
    two = cost.of_tokens([[9], [9]])
    assert two.num_bytes - one.num_bytes == 4 * 64 + 10 * cost.kv_bytes_per_token
    assert two.flops == 2 * one.flops
    assert cost.of_tokens([[8, 9]]).num_bytes == one.num_bytes + 4 * 64
    assert cost.of_tokens([[8, 9]]).flops == one.flops + cost.of_tokens([[8]]).flops
    # Prompts: the last layer after its keys and values, and the heads, for the labelled token only.
    prompt = cost.of_prompts(1, 10, 1)
    attention = 4 * 128 * 55 * (2 + 1 / 10)
    assert prompt.flops == pytest.approx(2 * (3 * 10 * qkv + 21 * rest + heads) + attention)
    assert prompt.num_bytes == cost.of_tokens([range(10)]).num_bytes
    assert cost.of_prompts(1, 10, 3).num_bytes - prompt.num_bytes == 2 * cost.of_tokens([]).num_bytes


def test_weights_are_counted_as_the_checkpoint_has_them(cost: CostModel, tiny: Path) -> None:
    stored = (tiny / "model.safetensors").stat().st_size / 4
    assert 0.97 * stored < cost.num_weights < stored  # norms and the header are left out


def test_limits_are_the_best_seen(cost: CostModel) -> None:
    slower = machine.Ceilings(1, 5e9, 5e9, 2**20, 300e9, 400e9, 0.0, "none")
    assert Limits.best_of([CEILINGS, slower], "float32") == Limits(10e9, 300e9)
    assert Limits.best_of([CEILINGS, slower], "bfloat16") == Limits(10e9, 400e9)
    seconds, bound = Limits(10e9, 1e15).seconds(cost.of_tokens([[9]]))
    assert (seconds, bound) == (cost.of_tokens([[9]]).num_bytes / 10e9, "bandwidth")
    assert Limits(1e15, 1e9).seconds(cost.of_tokens([[9]]))[1] == "compute"


# -- measuring ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arrival", "k"), [("lockstep", 1), ("lockstep", 3), ("poisson", 2)])
def test_a_point_measures_every_token(
    measure: Callable[..., Any], engine: Engine, arrival: Any, k: int
) -> None:
    row = measure(Point(3, 10, 8, k=k, arrival=arrival, rate=1000.0))
    assert row["num_tokens"] == 24
    assert row["tokens_per_s"] == pytest.approx(24 / row["window_s"])
    assert row["num_steps"] * row["tokens_per_step"] == pytest.approx(24)
    assert row["kv_used_bytes"] == 3 * 5 * 4 * 2 * 3 * 2 * 32 * 4  # 20 tokens each: 5 blocks of 4
    assert 0 < row["share_of_floor"] < 1
    assert not row["is_cut_short"]
    for name in ("step_ms", "label_latency_ms"):
        assert 0 < row[name]["p50"] <= row[name]["p90"] <= row[name]["p99"]
    if arrival == "lockstep":
        assert row["num_steps"] == -(-8 // k)
    assert engine.stats()["streams_open"] == 0


def test_open_loop_latency_counts_the_wait_for_a_running_step(
    measure: Callable[..., Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def advance(seconds: float) -> None:
        clock[0] += seconds

    step = engine.step

    def slow_step() -> list[Any]:
        advance(0.05)
        return step()

    monkeypatch.setattr(engine, "step", slow_step)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", advance)
    point = Point(1, 4, 11, arrival="poisson", rate=1000.0)
    row = measure(point)
    # The first token starts a step of 50 ms; the others fall due in it, wait for its end and for their own step.
    due_ms = [1e3 * arrival.due_s for arrival in poisson_arrivals(point, seed=0)]
    assert due_ms[-1] < due_ms[0] + 50
    latencies = [50.0, *(due_ms[0] + 100 - due for due in due_ms[1:])]
    assert row["label_latency_ms"]["p50"] == pytest.approx(np.median(latencies))
    assert row["label_latency_ms"]["p99"] == pytest.approx(np.percentile(latencies, 99))
    assert row["num_steps"] == 2
    assert row["step_ms"]["p50"] == pytest.approx(50.0)


@pytest.mark.parametrize("fault", ["lost", "repeated"])
def test_lost_and_repeated_labels_are_errors(
    measure: Callable[..., Any], engine: Engine, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: step()[1:] if fault == "lost" else step() * 2)
    with pytest.raises(IntegrityError):
        measure(Point(2, 4, 6))
    assert engine.stats()["streams_open"] == 0


def test_a_deadline_cuts_a_point_short(measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(Point(1, 4, 6), deadline=time.perf_counter()) is None
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    row = measure(Point(2, 4, 100), deadline=60.0)
    assert row["is_cut_short"]
    assert 4 <= row["num_tokens"] < 200
    assert row["tokens_per_s"] == pytest.approx(row["num_tokens"] / row["window_s"])


def test_wrong_labels_are_not_timed(
    checkpoints: Callable[..., Path], tiny: Path, cost: CostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "vocab_size": 512,
        "dtype": "float32",
        "is_quantized": False,
        "seed": 0,
        "num_weights": cost.num_weights,
    }
    with Engine.from_pretrained(tiny, **LIMITS) as engine:
        assert check_labels(engine, tiny, **options)["largest_error"] < 1e-4
    other = checkpoints(vocab_size=512, dtype="float32", seed=1)
    with (
        Engine.from_pretrained(other, **LIMITS) as engine,
        pytest.raises(LabelsDiffer, match="Nothing was timed"),
    ):
        check_labels(engine, tiny, **options)
    with Engine.from_pretrained(tiny, dtype="bfloat16", **LIMITS) as engine:
        checked = check_labels(engine, tiny, **options | {"dtype": "bfloat16"})
        assert 1e-4 < checked["mean_error"] <= checked["mean_limit"]
        monkeypatch.setattr("guardengine.bench.check._engine_logits", lambda *_: np.full(232, np.nan))
        with pytest.raises(LabelsDiffer):
            check_labels(engine, tiny, **options | {"dtype": "bfloat16"})


def test_released_is_timed_for_one_stream_and_rounds_take_turns(
    engine: Engine, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for kind in (compare._Ours, compare._Incremental, compare._Released):

        def recorded(self: Any, chunks: Any, advance: Any = kind.advance) -> float:
            order.append(self.name)
            return float(advance(self, chunks))

        monkeypatch.setattr(kind, "advance", recorded)
    counted: list[int] = []
    points = compare.compare_points([8, 20], [1, 3], k=2)
    assert points == [(1, 8, 2), (1, 20, 2), (3, 8, 2)]
    comparison = compare.Comparison(engine, HFGuard(tiny), 512, 0, 2, counted.append)
    one, three = comparison.run(points[0]), comparison.run(points[2])
    names = ["engine", "hf_incremental_sdpa", "hf_incremental_eager", "hf_released"]
    assert [row["contender"] for row in one] == names
    assert order[:12] == [*names, *names[1:], names[0], *names[2:], *names[:2]]  # each begins in turn
    assert [row["contender"] for row in three] == names[:3]
    assert one[0]["largest_logit_difference"] < 1e-4
    assert one[0]["engine_is_faster_by"] == 1.0
    for row in one[1:]:
        assert row["engine_is_faster_by"] == pytest.approx(row["ms"]["p50"] / one[0]["ms"]["p50"])
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["ms"]["p50"])
    assert sum(counted) == compare.num_measurements([points[0], points[2]], 2)
    assert engine.stats()["streams_open"] == 0


# -- weights ------------------------------------------------------------------------------------------------


def test_random_weights_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDENGINE_CACHE", str(tmp_path / "cache"))
    folder = bench_checkpoints.cached_checkpoint("stream-tiny", progress=False, vocab_size=512)
    assert folder.parent == tmp_path / "cache"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert bench_checkpoints.cached_checkpoint("stream-tiny", progress=False, vocab_size=512) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert bench_checkpoints.cached_checkpoint("stream-tiny", progress=False, vocab_size=600) != folder
    with pytest.raises(ConfigError, match="stream-tiny"):
        bench_checkpoints.cached_checkpoint("nonsense")


def test_cache_folder_defaults_to_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GUARDENGINE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bench_checkpoints.cache_folder() == tmp_path / ".cache" / "guardengine"


# -- the whole command --------------------------------------------------------------------------------------

SMALL = ("--streams", "1,3", "--prompt-len", "8", "--response-len", "4", "--threads", "1")


def test_the_command_writes_record_table_and_plot(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(tiny), *SMALL, "--compare", "hf", "--contexts", "8,16"]
    arguments += ["--compare-streams", "2", "--rounds", "2", "--seed", "7"]
    arguments += ["--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")]
    assert main(arguments) == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["schema"] == 1
    assert record["seed"] == 7
    assert "--compare hf" in record["command"]
    assert record["machine"]["cores"] >= 1
    assert record["commit"] == record["machine"]["commit"]
    assert {"guardengine", "torch", "transformers"} <= set(record["versions"])
    assert record["model"]["dtype"] == "float32"
    assert record["model"]["num_threads"] == 1
    assert record["check"]["largest_error"] < 1e-4
    assert [row["num_streams"] for row in record["throughput"]] == [1, 3]
    assert record["left_out"] == []
    measured = [(row["num_streams"], row["context_len"], row["contender"]) for row in record["compare"]]
    assert len(measured) == len(set(measured)) == 4 + 4 + 3
    table = capsys.readouterr().out
    assert table == report.markdown(record) + "\n"
    assert record["command"] in table
    for line in (line for line in table.splitlines() if line.startswith("| ")):
        assert line.count("|") in (11, 9)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_runs_open_loop_without_transformers(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else find_spec(name, *a)
    )
    monkeypatch.setitem(sys.modules, "transformers.models.qwen3", None)
    arguments = ["--checkpoint", str(tiny), *SMALL, "--arrival", "poisson", "--rate", "500"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "not checked: transformers is not installed" in out
    assert "Poisson, 500 tokens/s" in out
    assert main(["--checkpoint", str(tiny), *SMALL, "--compare", "hf"]) == 2
    assert "pip install '.[bench]'" in capsys.readouterr().err


def test_points_without_time_are_named(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(tiny), *SMALL, "--time-limit", "0.000001"]
    assert main(arguments) == 0
    assert "Left out for want of time: 1, 3 streams. Raise --time-limit" in capsys.readouterr().out
    assert main([*arguments, "--plot", str(tmp_path / "empty.png")]) == 2
    assert "no point was measured; raise --time-limit" in capsys.readouterr().err
    assert not (tmp_path / "empty.png").exists()


def test_wrong_labels_exit_with_status_1(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("guardengine.bench.check._engine_logits", lambda *_: np.zeros(232, np.float32))
    monkeypatch.setattr(throughput, "measure_point", None)  # calling it would fail the test
    assert main(["--checkpoint", str(tiny), *SMALL]) == 1
    captured = capsys.readouterr()
    assert "Nothing was timed" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--streams", "1,none"], "'none': a whole number"),
        (["--streams", "0"], "from 1 to"),
        (["--k", "-1"], "'-1': a whole number"),
        (["--seed", "1.5"], "'1.5': a whole number"),
        (["--time-limit", "nan"], "seconds above 0"),
        (["--preset", "gen-0.6b"], "invalid choice"),
        (["--dtype", "int4"], "invalid choice"),
        (["--nonsense"], "unrecognized arguments"),
        (["--rate", "5"], "--rate is for --arrival poisson"),
        (["--arrival", "poisson", "--rate", "0"], "rate=0.0"),
        (["--contexts", "64"], "--contexts is for --compare hf"),
        (["--checkpoint", "/nonexistent"], "--checkpoint takes a checkpoint folder"),
        (["--json", "/nonexistent/x.json"], "/nonexistent is not a folder"),
        (["--plot", "/"], "is a folder"),
        (["--prompt-len", "9000"], "the model takes 8192"),
        (["--streams", "1000000", "--prompt-len", "8000"], "use fewer --streams"),
        (["--backend", "abacus"], "abacus"),
    ],
)
def test_bad_options_exit_with_status_2(
    tiny: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        status = main(["--checkpoint", str(tiny), "--quick", *arguments])
    except SystemExit as exit_:  # argparse's own
        status = exit_.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err
    assert "Traceback" not in captured.err


# -- tables and pictures ------------------------------------------------------------------------------------


def row(num_streams: int, context_len: int, contender: str, ms: float) -> dict[str, Any]:
    return {
        "num_streams": num_streams,
        "context_len": context_len,
        "k": 1,
        "contender": contender,
        "ms": {"p20": ms, "p50": ms, "p80": ms},
        "ms_per_token": ms / num_streams,
        "tokens_per_s": 1e3 * num_streams / ms,
    }


def test_curves_hold_measured_points_of_the_better_attention_only() -> None:
    rows = []
    for num_streams, context_len in ((1, 64), (1, 256), (4, 64)):
        for contender, ms in (
            ("engine", 10.0),
            ("hf_incremental_sdpa", 40.0),
            ("hf_incremental_eager", 20.0),
        ):
            rows.append(row(num_streams, context_len, contender, ms * num_streams))
    rows.append(row(1, 256, "hf_released", 800.0))
    record = {"throughput": [], "compare": rows}
    latency = plot.latency_curves(record)
    assert latency["incremental"] == [(64, 20.0), (256, 20.0)]
    assert latency["hf_released"] == [(256, 800.0)]
    curves, context = plot.throughput_curves(record)
    assert context == "context 64"  # where most stream counts were measured
    assert curves["engine"] == [(1, 100.0), (4, 100.0)]
    assert curves["incremental"] == [(1, 50.0), (4, 50.0)]
    assert "hf_released" not in curves


def test_unwritable_plot_format_is_named(tmp_path: Path) -> None:
    record = {
        "throughput": [{"num_streams": 1, "context_len": 8, "tokens_per_s": 5.0}],
        "compare": [],
        "model": {"name": "m", "dtype": "float32", "num_threads": 1},
        "machine": {"cpu": "c"},
    }
    plot.save_plot(record, tmp_path / "one_point.svg")
    with pytest.raises(ConfigError, match=r"give a \.png"):
        plot.save_plot(record, tmp_path / "picture.txt")
