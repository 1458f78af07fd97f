"""Measured choices of configurations: taken once, kept in a file, and no start fails over them."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from guardengine.runners import tuned


@dataclasses.dataclass(frozen=True)
class Config:
    block_n: int
    split_k: int


class Ops:
    """Measuring picks another configuration every time it is asked, as it may on a GPU."""

    LinearConfig = Config
    measure_graph = None

    def __init__(self) -> None:
        self.measured: list[tuple[str, tuple[int, int]]] = []
        self.fails = False

    def default_config(self, operator: str, shape: tuple[int, int], *, dtype: Any, num_sms: int) -> Config:
        return Config(64, 1)

    def tune(self, operator: str, shape: tuple[int, int], *_: Any, **__: Any) -> Config:
        if self.fails:
            raise RuntimeError("out of resources")
        self.measured.append((operator, shape))
        return Config(32, len(self.measured))


@pytest.fixture
def ops() -> Ops:
    return Ops()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GUARDENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended GPU")
    monkeypatch.setattr(tuned.metadata, "version", lambda name: "1.2.3")
    return tmp_path / "cache"


def configs(ops: Ops, *, can_time: bool = True, dtype: torch.dtype = torch.bfloat16) -> Any:
    layer = SimpleNamespace(
        qkv=torch.empty(96, 64),
        o=torch.empty(64, 32),
        gate_up=torch.empty(256, 64),
        down=torch.empty(64, 128),
    )
    weights: Any = SimpleNamespace(layers=(layer,), embed=torch.empty(1, dtype=dtype))
    accelerator: Any = SimpleNamespace(can_time=can_time, num_cores=8, device=torch.device("cuda", 0))
    return tuned.matrix_configs(ops, weights, accelerator)  # type: ignore[arg-type]


KEYS = {
    ("norm_linear", (96, 64)),
    ("linear_add", (64, 32)),
    ("norm_gate_up", (256, 64)),
    ("linear_add", (64, 128)),
}


def test_by_rule_where_nothing_can_be_timed(ops: Ops, folder: Path) -> None:
    assert configs(ops, can_time=False) == dict.fromkeys(KEYS, Config(64, 1))
    assert not ops.measured
    assert not folder.exists()


def test_measured_once_and_the_same_ever_after(ops: Ops, folder: Path) -> None:
    first = configs(ops)
    assert first.keys() == KEYS
    assert len(set(first.values())) == 4
    assert configs(ops) == first
    assert len(ops.measured) == 4
    assert configs(ops, dtype=torch.float32) != first  # other sums: measured apart
    assert [path.name for path in folder.iterdir()] == ["triton.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"x": 1}', "null"], ids=["empty", "cut", "list", "other", "null"]
)
def test_a_file_that_says_nothing_is_replaced(ops: Ops, folder: Path, text: str) -> None:
    folder.mkdir()
    tuned.tuned_file().write_text(text)
    first = configs(ops)
    assert configs(ops) == first
    assert len(ops.measured) == 4


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "64", 4096])
def test_numbers_that_no_choice_has_are_measured_again(ops: Ops, value: Any) -> None:
    configs(ops)
    path = tuned.tuned_file()
    kept = json.loads(path.read_text())
    kept[min(kept)]["block_n"] = value
    path.write_text(json.dumps(kept))
    configs(ops)
    assert len(ops.measured) == 5


def test_what_cannot_be_measured_is_chosen_by_rule(ops: Ops, caplog: pytest.LogCaptureFixture) -> None:
    ops.fails = True
    assert configs(ops) == dict.fromkeys(KEYS, Config(64, 1))
    assert "out of resources" in caplog.text
    ops.fails = False
    configs(ops)
    assert len(ops.measured) == 4  # not kept: the next start tries again


def test_a_folder_that_cannot_be_written_stops_nothing(
    ops: Ops, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING, "guardengine"):
        assert configs(ops).keys() == KEYS
    assert "cannot be written" in caplog.text
