"""Predictions for GPUs that are not here: what is counted, and that nobody takes one for a measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels' configurations are Triton's")

from guardengine.bench.__main__ import main
from guardengine.bench.floor import CostModel
from guardengine.bench.gpu.count import Counter, Shape
from guardengine.bench.gpu.devices import GPUS
from guardengine.bench.gpu.predict import Assumptions, predict, streams_at_rate, weights_floor_ms
from guardengine.checkpoint.random_weights import preset_config

CONFIG = preset_config("stream-0.6b")
ROWS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64)


@pytest.mark.parametrize("name", GPUS)
def test_bytes_stay_near_the_least(name: str) -> None:
    counter, cost = Counter(CONFIG, "bfloat16", "bfloat16", GPUS[name]), CostModel(CONFIG, 2, 2)
    for context in (256, 300, 1024, 4096, 8192):
        for rows in ROWS:
            for k in (k for k in (1, 4) if rows % k == 0):
                least = cost.of_tokens([range(context - k, context)] * (rows // k)).num_bytes
                if k == 4 and context < 1024 and rows > 16:
                    continue  # few keys to read: activations of many rows weigh more
                counted = counter.step(Shape(rows // k, k, context)).memory_bytes
                assert 1.0 <= counted / least <= 1.15, (rows, k, context, counted / least)


def test_each_weight_is_read_once() -> None:
    """With one row and no context to speak of, what remains is the weights and under a hundredth beside."""
    step = Counter(CONFIG, "bfloat16", "bfloat16", GPUS["h100"]).step(Shape(1, 1, 1))
    weights = 2 * (CostModel(CONFIG, 2, 2).num_weights - CONFIG.vocab_size * CONFIG.hidden_size)
    assert weights <= step.memory_bytes <= 1.01 * weights


@pytest.mark.parametrize("rows", ROWS)
def test_launches(rows: int) -> None:
    step = Counter(CONFIG, "bfloat16", "bfloat16", GPUS["a100"]).step(Shape(rows, 1, 700))
    assert len(step.layer) <= 6
    assert len(step.launches) <= 6 * CONFIG.num_layers + 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [("rtx3090", 0.94), ("a100", 0.43), ("h100", 0.26), ("h200", 0.18), ("rtx4090", 0.87)],
)
def test_floors_of_the_weights_alone(name: str, expected: float) -> None:
    assert round(weights_floor_ms(GPUS[name], CONFIG), 2) == expected


def test_larger_steps_have_four_launches_more_in_a_layer() -> None:
    step = Counter(CONFIG, "bfloat16", "bfloat16", GPUS["h100"]).step(Shape(65, 1, 256))
    assert len(step.layer) == 10


def test_a_prediction_never_beats_its_floor() -> None:
    for gpu in GPUS.values():
        for shape in ((1, 1, 256), (16, 4, 4096), (256, 1, 1024)):
            for dtype, kv_dtype in (("bfloat16", "bfloat16"), ("float32", "float32"), ("bfloat16", "int8")):
                found = predict(gpu, CONFIG, dtype, kv_dtype, shape, Assumptions())
                assert found.step_ms > found.floor_ms > 0


def test_assumptions_matter() -> None:
    def ms(**changes: float) -> float:
        return predict(
            GPUS["h100"], CONFIG, "bfloat16", "bfloat16", (8, 1, 512), Assumptions(**changes)
        ).step_ms

    assert ms(gap_us=3.0) - ms(gap_us=1.0) == pytest.approx(2e-3 * (6 * CONFIG.num_layers + 2))
    assert ms(bandwidth_share=0.5) > ms()
    assert ms(l2_speed=0.5) > ms()
    assert ms(step_us=550.0) - ms() == pytest.approx(0.1)
    assert ms(stream_us=28.0) - ms() == pytest.approx(8 * 0.01)


def test_streams_at_a_rate_are_the_most_that_keep_up() -> None:
    arguments = (GPUS["l4"], CONFIG, "bfloat16", "bfloat16")
    most = streams_at_rate(*arguments, 1, 1024, 20.0, Assumptions())

    def keeps_up(streams: int) -> bool:
        found = predict(*arguments, (streams, 1, 1024), Assumptions())
        return found.fits and found.step_ms <= 50

    assert keeps_up(most)
    assert not keeps_up(most + 1)
    assert streams_at_rate(*arguments, 1, 1024, 1e6, Assumptions()) == 0


def test_every_assumption_has_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "predicted.json"
    given = {"bandwidth_share": 0.5, "l2_speed": 3.0, "flops_share": 0.25, "gap_us": 2.0, "step_us": 7.0,
             "stream_us": 3.0}  # fmt: skip
    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["--predict", "l4", "--streams", "1", "--context", "9", "--json", str(path), *options]) == 0
    assert json.loads(path.read_text())["assumptions"] == given
    assert Assumptions(**given) != Assumptions()


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "predicted.json"
    arguments = ["--predict", "h100", "--streams", "1,64", "--context", "256", "--json", str(path)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("PREDICTION, not a measurement")
    assert "Assumed, from steps of 0.6B on one H100" in text
    record = json.loads(path.read_text())
    assert record["kind"].startswith("PREDICTION")
    assert [row["num_launches"] for row in record["steps"]] == [170, 170]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "benchmarks/results/h100.json"], "not kept among measurements"),
        (["--json", "nowhere/h100.json"], "is not a folder"),
        (["--context", "9000"], "8192 tokens are possible"),
        (["--context", "2", "--k", "3"], "from k=3"),
    ],
    ids=str,
)
def test_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(["--predict", "h100", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--predict", "h900"], ["--predict", "h100", "--bandwidth-share", "1.5"]]
)
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[Any]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
