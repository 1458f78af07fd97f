"""Choosing a device and a backend, and what is refused before anything is loaded. The GPUs are made up."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from guardengine import ConfigError, Engine
from guardengine.checkpoint.random_weights import preset_config
from guardengine.config import EngineConfig
from guardengine.engine.loading import Placement, _num_blocks, choose_backend
from guardengine.runners import accelerator
from guardengine.runners.accelerator import InterpretedAccelerator
from guardengine.runners.gpu_limits import DeviceMemory, check_bfloat16, check_shapes, working_bytes

GIB = 2**30
CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """gpus(count, capability=..., free=...) makes torch say so."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def pretend(count: int = 1, capability: tuple[int, int] = (9, 0), free: int = 80 * GIB) -> None:
        for name, value in {
            "is_available": count > 0,
            "device_count": count,
            "get_device_capability": capability,
            "get_device_name": "Pretended GPU",
            "mem_get_info": (free, 96 * GIB),
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    return pretend


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("backend", "device", "quantization", "expected"),
    [
        ("auto", "auto", None, ("triton", "cuda:0")),
        ("auto", "cuda", None, ("triton", "cuda:0")),
        ("auto", "cuda:1", None, ("triton", "cuda:1")),
        ("triton", "auto", None, ("triton", "cuda:0")),
        ("reference", "cuda:1", None, ("reference", "cuda:1")),
        ("reference", "cuda", "int8", ("reference", "cuda:0")),
        ("reference", "auto", None, ("reference", "cpu")),
        ("auto", "cpu", None, ("cpu", "cpu")),
        ("cpu", "auto", None, ("cpu", "cpu")),
        ("auto", "auto", "int8", ("cpu", "cpu")),
    ],
)
def test_choice_with_two_gpus(
    gpus: Any, backend: str, device: str, quantization: str | None, expected: tuple[str, str]
) -> None:
    gpus(2)
    found = choose_backend(backend, device, quantization)
    assert found == Placement(expected[0], torch.device(expected[1]))


def test_auto_leaves_a_gpu_that_is_too_old_alone(gpus: Any) -> None:
    gpus(1, capability=(7, 5))
    assert choose_backend("auto", "auto", None) == Placement("cpu", CPU)


def test_choice_without_a_gpu(no_gpu: None) -> None:
    assert choose_backend("auto", "auto", None) == Placement("cpu", CPU)
    assert choose_backend("auto", "cpu", "w8a8") == Placement("cpu", CPU)


@pytest.mark.parametrize(
    ("arguments", "found", "mend"),
    [
        (("cpu", "cuda", None), "backend='cpu' with device='cuda'", "backend='triton'"),
        (("triton", "cuda", "int8"), "quantization='int8'", "backend='cpu'"),
        (("auto", "cuda", "int8"), "quantization='int8'", "backend='cpu'"),
        (("auto", "cuda:2", None), "there are 2 GPU.*last is cuda:1", "CUDA_VISIBLE_DEVICES"),
        (("auto", "cuda:", None), "device='cuda:'", "'cuda:<index>'"),
        (("auto", "cuda:-1", None), "device='cuda:-1'", "'cuda:<index>'"),
        (("auto", "gpu", None), "device='gpu'", "'cuda'"),
        (("auto", 0, None), "device=0", "'cuda'"),
        (("gpu", "auto", None), "backend='gpu'", "triton"),
    ],
    ids=str,
)
def test_refused_choices(gpus: Any, arguments: tuple[Any, ...], found: str, mend: str) -> None:
    gpus(2)
    with pytest.raises(ConfigError, match=f"{found}.*{mend}"):
        choose_backend(*arguments)


def test_a_torch_without_cuda_is_named(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"torch .* is a build without CUDA; install one"):
        choose_backend("auto", "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(ConfigError, match="built for AMD GPUs"):
        choose_backend("auto", "cuda", None)


@pytest.mark.parametrize(
    "reason", ["The NVIDIA driver on your system is too old (found version 11040).", "Found no NVIDIA driver"]
)
def test_what_the_driver_says_is_passed_on(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def init() -> None:
        raise RuntimeError(f"{reason}\nsecond line")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ConfigError) as error:
        choose_backend("auto", "cuda", None)
    assert reason in str(error.value)
    assert "second line" not in str(error.value)
    assert "built for CUDA 13.0" in str(error.value)
    assert "nvidia-smi" in str(error.value)


def test_triton_must_be_installed(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(1)
    monkeypatch.setattr(accelerator.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Triton is not installed.*pip install triton==3\.7\.1"):
        choose_backend("triton", "cuda", None)


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_too_old_a_gpu_is_refused(gpus: Any, tiny: Path, capability: tuple[int, int]) -> None:
    gpus(1, capability=capability)
    with pytest.raises(ConfigError, match=rf"compute capability 7\.{capability[1]}.*needs 8\.0.*reference"):
        Engine.from_pretrained(tiny, device="cuda")


def test_without_a_gpu_the_kernels_run_in_the_interpreter_only(no_gpu: None, tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs a GPU.*backend='cpu'.*TRITON_INTERPRET=1"):
        Engine.from_pretrained(tiny, backend="triton", device="cpu")


def test_the_interpreter_and_a_gpu_exclude_each_other(
    gpus: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET is set: unset it"):
        Engine.from_pretrained(tiny, device="cuda")
    assert choose_backend("auto", "auto", None).backend == "cpu"


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_too_little_memory_is_said_in_numbers(gpus: Any, tiny: Path, backend: str) -> None:
    gpus(1, free=3 * GIB)
    with pytest.raises(ConfigError) as error:
        Engine.from_pretrained(tiny, device="cuda", backend=backend, kv_cache_bytes=4 * GIB)
    assert "3.00 GiB are free" in str(error.value)
    assert "4.00 for the KV cache" in str(error.value)
    assert "kv_cache_bytes" in str(error.value)


def test_the_kv_cache_takes_half_of_what_is_left(gpus: Any) -> None:
    gpus(1, free=80 * GIB)
    config, options = preset_config("stream-0.6b"), EngineConfig()
    memory = DeviceMemory.of(torch.device("cuda", 0), options, config, torch.bfloat16, 8192)
    assert memory.weights == pytest.approx(1.19e9, rel=0.01)
    assert 0.5 * GIB < memory.working < 1.5 * GIB
    block = 16 * 2 * 28 * 8 * 128 * 2
    taken = _num_blocks(options, config, 8192, torch.bfloat16, memory) * block
    assert taken == pytest.approx(memory.left / 2, abs=block)
    memory.check(taken)
    few = EngineConfig(max_num_streams=2)
    assert _num_blocks(few, config, 8192, torch.bfloat16, memory) == 2 * 512


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"head_dim": 24}, r"head_dim=24: the triton backend needs one of 16, 32"),
        ({"hidden_size": 20000}, r"hidden_size=20000.*16384 at most"),
        ({"num_kv_heads": 1, "num_heads": 64}, r"num_key_value_heads is 64.*32 at most"),
    ],
    ids=["head_dim", "hidden_size", "group"],
)
def test_shapes_that_no_kernel_takes(changes: dict[str, int], match: str) -> None:
    config = dataclasses.replace(preset_config("stream-tiny"), **changes)
    with pytest.raises(ConfigError, match=match + ".*backend='reference'"):
        check_shapes(config, EngineConfig())
    check_shapes(preset_config("stream-8b"), EngineConfig())
    check_shapes(preset_config("stream-8b"), EngineConfig(max_num_batched_tokens=16384))


def test_steps_that_are_too_large_to_capture() -> None:
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens=16385.*16384"):
        check_shapes(preset_config("stream-8b"), EngineConfig(max_num_batched_tokens=16385))


def test_working_memory_of_the_released_sizes() -> None:
    """Not the last byte; but an order of magnitude off would refuse GPUs that are large enough, or run out."""
    sizes = [
        working_bytes(preset_config(f"stream-{name}"), torch.bfloat16, 2048, 8192) for name in ("0.6b", "8b")
    ]
    assert 0.1 * GIB < sizes[0] < 0.5 * GIB
    assert 0.4 * GIB < sizes[1] < 1.5 * GIB


def test_bfloat16_is_refused_where_the_interpreter_gets_it_wrong() -> None:
    wrong: Any = SimpleNamespace(linear=lambda x, weight: x * 2)
    right: Any = SimpleNamespace(linear=lambda x, weight: x @ weight.T)
    on_cpu, on_gpu = InterpretedAccelerator(), SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="interpreter computes it wrongly; pass dtype='float32'"):
        check_bfloat16(wrong, torch.bfloat16, on_cpu)
    check_bfloat16(right, torch.bfloat16, on_cpu)
    check_bfloat16(wrong, torch.float32, on_cpu)
    check_bfloat16(wrong, torch.bfloat16, on_gpu)  # type: ignore[arg-type]
