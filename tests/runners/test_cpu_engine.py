"""The engine on the cpu backend: transformers' numbers, threads, memory, instruction sets. Bits: test_invariance.py."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from feeding import VOCAB, feed, feed_at_once, ids, poison

from guardengine import AutoGuard, Engine
from guardengine.bench.hf import HFGuard
from guardengine.errors import ConfigError
from guardengine.kernels import native
from guardengine.runners.cores import physical_cores

pytestmark = pytest.mark.slow

LOGITS = ("risk_level_logits", "category_logits", "query_risk_level_logits", "query_category_logits")
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def make_engine(tiny: Path) -> MakeEngine:
    def make(**options) -> Engine:
        defaults = {"backend": "cpu", "kv_cache_bytes": 2**24, "max_model_len": 512, "block_size": 4}
        return Engine.from_pretrained(tiny, **(defaults | options))

    return make


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def engine(make_engine: MakeEngine, dtype: str) -> Iterator[Engine]:
    with make_engine(dtype=dtype) as engine:
        yield poison(engine)
        engine.check_integrity()


PROMPT, RESPONSE = ids(70, 1), ids(150, 2)


@pytest.fixture
def expected(engine: Engine) -> np.ndarray:
    return feed_at_once(engine, PROMPT, RESPONSE)


def test_a_slow_block_size_is_said(make_engine: MakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    for block_size, said in ((16, 0), (24, 1)):
        caplog.clear()
        make_engine(block_size=block_size).close()
        assert len([r for r in caplog.records if "not a multiple of 16" in r.getMessage()]) == said


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_cache_of_another_dtype(make_engine, engine: Engine, expected, dtype: str, kv_dtype: str) -> None:
    with make_engine(dtype=dtype, kv_dtype=kv_dtype) as mixed:
        whole = feed(mixed, PROMPT, RESPONSE, 1000)
        difference = np.abs(whole.view(np.float32) - expected.view(np.float32)).max()
        assert 0 < difference < 0.2


SHAPES = {
    "gqa2-d64": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "gqa4-d128": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128},
    "mha-d32": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 96},
}


@pytest.mark.parametrize("isa", native.usable_isas())
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_numbers(checkpoints, monkeypatch: pytest.MonkeyPatch, shape: str, isa: str) -> None:
    monkeypatch.setenv("GUARDENGINE_ISA", isa)
    folder = checkpoints(vocab_size=VOCAB, dtype="float32", **SHAPES[shape])
    exact_model = HFGuard(folder, dtype=torch.float32)
    bf16_model = HFGuard(folder, dtype=torch.bfloat16)
    fp32 = AutoGuard.from_pretrained(folder, backend="cpu", max_num_batched_tokens=100)
    bf16 = AutoGuard.from_pretrained(folder, backend="cpu", dtype="bfloat16")
    for length in (1, 20, 333):
        tokens = torch.tensor([ids(length, length)])
        exact, plain = exact_model.forward(tokens), bf16_model.forward(tokens)
        ours, rounded = fp32(tokens), bf16(tokens)
        for name in LOGITS:
            e, h = getattr(exact, name), getattr(plain, name)
            assert (getattr(ours, name) - e).abs().max() <= 1e-4
            if length > 1:  # one position of two noisy computations is not ordered
                error = (getattr(rounded, name) - e).abs()
                assert error.mean() <= 2 * (h - e).abs().mean()
                assert error.max() <= 2 * (h - e).abs().max()


def test_stored_dtype_does_not_matter(checkpoints, make_engine) -> None:
    """bf16 weights stored as float32 are the same weights."""
    folder = checkpoints(vocab_size=VOCAB, dtype="bfloat16")
    with Engine.from_pretrained(folder, backend="cpu", kv_cache_bytes=2**22) as engine:
        assert engine.stats()["dtype"] == "bfloat16"
        assert engine.core.runner.weights.embed.dtype == torch.bfloat16
        stored = feed(engine, PROMPT, RESPONSE, 1000)
    with Engine.from_pretrained(folder, backend="cpu", dtype="float32", kv_cache_bytes=2**22) as engine:
        widened = feed(engine, PROMPT, RESPONSE, 1000)
    assert np.abs(stored.view(np.float32) - widened.view(np.float32)).max() < 0.2


def test_broken_numbers_reach_the_label(make_engine: MakeEngine, dtype: str) -> None:
    with make_engine(dtype=dtype) as engine:
        engine.core.runner.weights.norm.fill_(float("nan"))
        with engine.open(token_ids=[1, 2, 3]) as stream:
            engine.run()
            assert stream.prompt_label is not None
            assert np.isnan(stream.prompt_label.risk_logits).all()
            assert stream.prompt_label.risk == "Unsafe"


def num_os_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_forked_child_is_told_to_make_its_own_engine(tiny: Path) -> None:
    """Its threads are gone: without the check a step would hang."""
    code = (
        "import os, sys; from guardengine import Engine\n"
        f"engine = Engine.from_pretrained({str(tiny)!r}, backend='cpu', kv_cache_bytes=2**20)\n"
        "engine.open(token_ids=[1, 2])\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    try:\n"
        "        engine.step()\n"
        "    except RuntimeError as error:\n"
        "        sys.exit('os.fork()' in str(error) and 7)\n"
        "    sys.exit(1)\n"
        "status = os.waitpid(child, 0)[1]\n"
        "print(os.waitstatus_to_exitcode(status), len(engine.step()))\n"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "GUARDENGINE_ISA": ""},  # the shipped library's, whichever is tested here
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert run.stdout.split() == ["7", "1"]


@pytest.mark.slow
def test_closing_leaves_no_threads_and_no_memory(make_engine: MakeEngine) -> None:
    def once() -> None:
        with make_engine(num_threads=4) as engine:
            feed(engine, PROMPT, RESPONSE, 1000)

    once()
    gc.collect()
    threads, memory = num_os_threads(), resident_bytes()
    for _ in range(15):
        once()
    gc.collect()
    assert num_os_threads() == threads
    assert resident_bytes() - memory < 2**23  # an engine takes four times that


def test_an_engine_that_is_dropped_ends_its_threads(make_engine: MakeEngine) -> None:
    before = num_os_threads()
    engine = make_engine(num_threads=3)
    assert num_os_threads() == before + 2
    del engine
    gc.collect()
    assert num_os_threads() == before


@pytest.mark.parametrize(("value", "problem"), [("sse9", "no such"), ("AVX2", "no such"), ("avx", "no such")])
def test_unknown_instruction_set_is_refused(make_engine, monkeypatch, value: str, problem: str) -> None:
    monkeypatch.setenv("GUARDENGINE_ISA", value)
    with pytest.raises(ConfigError, match=f"GUARDENGINE_ISA='{value}'.*{problem}.*choose one of .*portable"):
        make_engine()


def test_missing_instruction_set_is_refused(make_engine, monkeypatch) -> None:
    monkeypatch.setattr(native, "usable_isas", lambda: ("portable",))
    monkeypatch.setenv("GUARDENGINE_ISA", "avx512bf16")
    with pytest.raises(
        ConfigError, match=r"GUARDENGINE_ISA='avx512bf16': this CPU or build lacks it; choose one of portable"
    ):
        make_engine()


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("hidden_size=80", {"hidden_size": 80}),
        ("head_dim=48", {"head_dim": 48}),
        ("intermediate_size=72", {"intermediate_size": 72}),
    ],
)
def test_sizes_that_the_kernels_lack_are_refused_at_load(checkpoints, key: str, overrides: dict) -> None:
    folder = checkpoints(vocab_size=VOCAB, dtype="float32", **overrides)
    with pytest.raises(
        ConfigError, match=f"{key}: the cpu backend needs a multiple of 32; use backend='reference'"
    ):
        Engine.from_pretrained(folder, backend="cpu", kv_cache_bytes=2**22)
    with Engine.from_pretrained(folder, backend="reference", kv_cache_bytes=2**22) as engine:
        assert engine.stats()["isa"] is None


def test_physical_cores_is_at_most_the_usable_cpus() -> None:
    assert 1 <= len(physical_cores()) <= len(os.sched_getaffinity(0))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux's affinities")
def test_pinned_threads_stay_on_a_core_each_and_give_the_same_bits(
    make_engine: MakeEngine, dtype: str
) -> None:
    cores = physical_cores()
    before = os.sched_getaffinity(0)
    threads = set(os.listdir("/proc/self/task"))
    with make_engine(dtype=dtype) as engine:
        expected = feed(engine, PROMPT, RESPONSE, 50)
    with make_engine(dtype=dtype, pin_threads=True) as engine:
        assert np.array_equal(feed(engine, PROMPT, RESPONSE, 50), expected)
        own = [int(task) for task in set(os.listdir("/proc/self/task")) - threads]
        assert sorted(next(iter(os.sched_getaffinity(task))) for task in own) == sorted(cores[1:])
        assert os.sched_getaffinity(0) == before  # the caller's thread is not ours to move
    with pytest.raises(
        ConfigError, match=rf"num_threads={len(cores) + 1}: this process may use {len(cores)} core"
    ):
        make_engine(num_threads=len(cores) + 1, pin_threads=True)
    with pytest.raises(ConfigError, match="pin_threads='yes': True or False"):
        make_engine(pin_threads="yes")
