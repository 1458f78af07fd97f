"""`make gpu-check`'s own logic on tiny shapes in Triton's interpreter: that it finds what is wrong, and survives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from guardengine.bench.gpu import check as gpu_check
from guardengine.bench.gpu import speed as gpu_speed
from guardengine.kernels import gpu


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "gpu-check"
    monkeypatch.setenv("GUARDENGINE_CACHE", str(folder))
    return folder


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    paths = [tmp_path / "check.json", tmp_path / "check.md"]
    status = gpu_check.main(["--interpret", "--json", str(paths[0]), "--markdown", str(paths[1]), *arguments])
    return status, json.loads(paths[0].read_text()), paths[1].read_text()


def test_a_clean_run(tmp_path: Path) -> None:
    status, record, text = run(tmp_path, "--only", "device,operators,engine,speed,sanitizer,vllm")
    assert (status, record["problems"]) == (0, [])
    assert record["kind"].endswith("not a measurement")
    cases = record["sections"]["operators"]["cases"]
    assert {case["operator"] for case in cases} >= {
        "rms_norm", "fused_add_rms_norm", "silu_and_mul", "linear", "norm_linear", "norm_gate_up", "linear_add",
        "guard_scores", "qk_norm_rope_store_kv", "paged_attention",
    }  # fmt: skip
    assert all(case["same_bits"] for case in cases)
    engine = record["sections"]["engine"]["float32"]
    assert engine["changed_bits"] == {}  # in the interpreter as it is patched here
    assert engine["labels"] == 8 + 15
    assert record["sections"]["speed"]["rows"][0]["step_ms"]["p50"] > 0
    assert "Nothing differs." in text
    assert "| context | streams | step ms |" in text


def test_a_wrong_kernel_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gpu.silu_and_mul
    monkeypatch.setattr(gpu, "silu_and_mul", lambda x: right(x) * 1.001)
    status, record, text = run(tmp_path, "--only", "operators", "--rows", "1")
    assert status == 1
    assert len(record["problems"]) == 1
    assert record["problems"][0].startswith("silu_and_mul, 1 rows of float32: error")
    assert "silu_and_mul" in text
    assert "DIFFERS: silu_and_mul" in capsys.readouterr().err


def test_bits_that_depend_on_company_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.rms_norm
    monkeypatch.setattr(gpu, "rms_norm", lambda x, *rest: right(x, *rest) * (1 + 1e-7 * len(x)))
    _, record, _ = run(tmp_path, "--only", "operators", "--rows", "3")
    assert [problem.partition(",")[0] for problem in record["problems"]] == ["rms_norm"]
    assert "depend on its company" in record["problems"][0]


def test_a_section_that_fails_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_speed, "engine_steps", broken)
    status, record, text = run(tmp_path, "--only", "speed,device")
    assert status == 1
    assert "illegal memory access" in record["sections"]["speed"]["error"]
    assert "broken" in record["sections"]["speed"]["traceback"]
    assert record["sections"]["device"]["machine"]["torch"] == torch.__version__
    assert "speed: FAILED" in text


def test_what_comes_too_late_is_left_out(tmp_path: Path) -> None:
    status, record, _ = run(tmp_path, "--only", "operators,speed", "--minutes", "-1")
    assert status == 0
    assert {found["left_out"] for found in record["sections"].values()} == {"no time was left"}


def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-P", "-m", "guardengine.bench.gpu.check"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, env=hidden, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "there is no GPU to check" in found.stderr


@pytest.mark.parametrize("arguments", [["--only", "speed,colour"], ["--rows", "1,x"], ["--streams", "0"]])
def test_bad_options(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        gpu_check.main(arguments)
    assert error.value.code == 2
