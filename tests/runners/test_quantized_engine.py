"""Engines with int8 weights, int8 activations and int8 KV caches: close to plain PyTorch over the same integers, and
honest about what they are. test_invariance.py has their bits."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feeding import VOCAB, bits, feed, ids, logits, poison
from pairwise import grid
from safetensors.torch import load as parse
from safetensors.torch import save_file

from guardengine import Engine
from guardengine.errors import ConfigError
from guardengine.kernels import native

pytestmark = pytest.mark.slow

MakeEngine = Callable[..., Engine]
QUANTIZATIONS, KV_DTYPES, MODEL_DTYPES = (None, "int8", "w8a8"), ("auto", "int8"), ("float32", "bfloat16")
# Without either it is the engine of test_cpu_engine.py.
MODES = [
    {"quantization": quantization, "kv_dtype": kv_dtype, "dtype": dtype}
    for quantization, kv_dtype, dtype in itertools.product(QUANTIZATIONS, KV_DTYPES, MODEL_DTYPES)
    if (quantization, kv_dtype) != (None, "auto")
]


@pytest.fixture(params=MODES, ids=lambda mode: "-".join(str(part) for part in mode.values()))
def mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.fixture(params=native.usable_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GUARDENGINE_ISA", request.param)
    return request.param


@pytest.fixture(scope="module")
def folder(checkpoints: Callable[..., Path]) -> Path:
    """Stored in bf16: every dtype then rounds the same numbers to int8."""
    return checkpoints(vocab_size=VOCAB, dtype="bfloat16")


@pytest.fixture(scope="module")
def make_engine(folder: Path) -> MakeEngine:
    def make(path: Path = folder, **options: Any) -> Engine:
        defaults = {"backend": "cpu", "kv_cache_bytes": 2**22, "max_model_len": 512, "block_size": 4}
        return poison(Engine.from_pretrained(path, **(defaults | options)))

    return make


@pytest.fixture
def engine(make_engine: MakeEngine, mode: dict[str, Any]) -> Iterator[Engine]:
    with make_engine(**mode) as engine:
        yield engine
        engine.check_integrity()


PROMPT, RESPONSE = ids(70, 1), ids(100, 2)


def test_stored_dtype_does_not_matter(folder: Path, make_engine: MakeEngine, mode, tmp_path: Path) -> None:
    """The same numbers stored in float32 and in bf16 are the same weights."""
    widened = rewrite(folder, tmp_path / "float32", lambda name, tensor: tensor.float(), dtype="float32")
    with make_engine(**mode) as narrow, make_engine(widened, **mode) as wide:
        assert np.array_equal(feed(narrow, PROMPT, RESPONSE, 50), feed(wide, PROMPT, RESPONSE, 50))


def rewrite(folder: Path, target: Path, change: Callable, dtype: str = "bfloat16") -> Path:
    """A copy of a checkpoint with every tensor passed through `change`."""
    shutil.copytree(folder, target)
    for path in target.glob("*.safetensors"):
        tensors = parse(path.read_bytes())
        save_file({name: change(name, tensor).contiguous() for name, tensor in tensors.items()}, path)
    config = json.loads((target / "config.json").read_text()) | {"torch_dtype": dtype}
    (target / "config.json").write_text(json.dumps(config))
    return target


# -- the numbers -----------------------------------------------------------------------------------------------

PREFILL = ids(300, 3)
SHAPES = {
    "gqa2-d32": {},
    "gqa4-d128": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128},
    "mha-d64": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 160},
}


def one_shot(path: Path, **options: Any) -> np.ndarray:
    limits = {"kv_cache_bytes": 2**22, "max_model_len": 512}
    with Engine.from_pretrained(path, **(limits | options)) as engine:
        poison(engine)
        with engine.open(token_ids=PREFILL, role="assistant") as stream:
            engine.run()
            return logits(stream.labels).astype(np.float64)


@pytest.fixture(scope="module")
def plain(checkpoints: Callable[..., Path]) -> Callable[..., np.ndarray]:
    """Logits of plain PyTorch, computed once for each of its options."""
    found: dict[str, np.ndarray] = {}

    def get(shape: str, **options: Any) -> np.ndarray:
        key = repr((shape, sorted(options.items())))
        if key not in found:
            path = checkpoints(vocab_size=VOCAB, dtype="bfloat16", **SHAPES[shape])
            found[key] = one_shot(path, backend="reference", **options)
        return found[key]

    return get


# Pairs of mode, shape and instruction set.
@grid(mode=MODES, shape=list(SHAPES), isa=native.usable_isas(), indirect=["isa"])
def test_the_references_numbers(checkpoints, plain, mode: dict[str, Any], shape: str, isa: str) -> None:
    """bf16: at most twice plain PyTorch's error. float32: as close as without int8, until an activation or key that
    the last bit decides is rounded the other way; from there on less far off than rounding itself."""
    path = checkpoints(vocab_size=VOCAB, dtype="bfloat16", **SHAPES[shape])
    actual = one_shot(path, backend="cpu", **mode)
    exact = plain(shape, **(mode | {"dtype": "float32"}))
    error = np.abs(actual - exact)
    if mode["dtype"] == "bfloat16":
        kv_dtype = "bfloat16" if mode["kv_dtype"] == "auto" else "int8"
        allowed = np.abs(plain(shape, **(mode | {"kv_dtype": kv_dtype})) - exact)
        assert error.mean() <= 2 * allowed.mean()
        assert error.max() <= 2 * allowed.max()
        return
    moved = np.abs(plain(shape, quantization=None, kv_dtype="auto", dtype="float32") - exact)
    assert moved.mean() > 1e-3  # it was rounded at all
    every_row = mode["quantization"] != "w8a8" and mode["kv_dtype"] == "auto"
    assert error[: None if every_row else 8].max() <= 1e-4
    assert error.mean() <= moved.mean()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_plain_pytorch_token_by_token(make_engine: MakeEngine, quantization: str | None) -> None:
    """Scales of earlier steps, layers and copied blocks are read back: far less off than rounding itself."""

    def run(k: int, kv_dtype: str = "int8", *, forks: bool = False) -> np.ndarray:
        options = {"quantization": quantization, "kv_dtype": kv_dtype, "dtype": "float32"}
        with make_engine(backend="reference", **options) as engine:
            stream = engine.open(token_ids=PREFILL[:1], role="assistant")
            for start in range(1, 64, k):
                stream = stream.fork() if forks else stream
                stream.append(PREFILL[start : start + k])
                engine.run()
            return logits(stream.labels).astype(np.float64)

    whole = run(63)
    moved = np.abs(run(63, "float32") - whole).mean()
    for other in (run(1), run(7, forks=True)):
        assert np.abs(other - whole).mean() <= 0.5 * moved


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_largest_shapes(checkpoints, quantization: str | None, isa: str) -> None:
    """Heads of 512 values, 256 query heads for one key head."""
    for overrides in (
        {"head_dim": 512, "num_attention_heads": 2, "num_key_value_heads": 1},
        {"head_dim": 32, "num_attention_heads": 256, "num_key_value_heads": 1},
    ):
        path = checkpoints(vocab_size=VOCAB, dtype="bfloat16", num_hidden_layers=1, **overrides)
        options = {"quantization": quantization, "kv_dtype": "int8", "dtype": "float32"}
        error = np.abs(
            one_shot(path, backend="cpu", **options) - one_shot(path, backend="reference", **options)
        )
        assert error[:8].max() <= 1e-4
        assert error.mean() <= 0.02


# -- broken numbers --------------------------------------------------------------------------------------------

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_broken_weight_reaches_every_label(
    folder: Path, make_engine: MakeEngine, tmp_path: Path, matrix: str
) -> None:
    """Of any matrix, under any scheme: no label may read as harmless."""

    def break_one(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if f"layers.1.{'mlp' if matrix in MATRICES[4:] else 'self_attn'}.{matrix}" in name:
            tensor = tensor.clone()
            tensor[-1, 3] = float("nan")
        return tensor

    path = rewrite(folder, tmp_path / "broken", break_one)
    for mode in MODES:
        with make_engine(path, **mode) as engine, engine.open(token_ids=[1, 2, 3]) as stream:
            stream.append([4, 5])
            engine.run()
            assert stream.prompt_label is not None
            for label in (stream.prompt_label, *stream.labels):
                assert np.isnan(label.risk_logits).all(), mode
                assert label.risk == "Unsafe"


def test_a_broken_token_breaks_what_follows_and_nothing_else(isa: str, engine: Engine) -> None:
    """Its keys and values are broken in the cache; tokens before it, and other streams, are as they were."""
    tokens = [token for token in PROMPT + RESPONSE if token != 77]
    expected = feed(engine, tokens[:1], tokens[1:], 1000)
    engine.core.runner.weights.embed[77] = float("nan")
    with engine.open(token_ids=tokens, role="assistant") as other:
        for k in (1000, 7):
            with engine.open(token_ids=tokens[:1]) as stream:
                text = [*tokens[1:91], 77, *tokens[91:]]
                for start in range(0, len(text), k):
                    stream.append(text[start : start + k])
                    engine.run()
                assert np.array_equal(bits(stream.labels[:90]), expected[:90])
                for label in stream.labels[90:]:
                    assert np.isnan(label.risk_logits).all()
                    assert label.risk == "Unsafe"
        assert np.array_equal(bits(other.labels)[1:], expected)


# -- books and options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_stats_say_what_runs_and_what_it_takes(make_engine: MakeEngine, mode, backend: str) -> None:
    for asked in (100_003, 2**20, 2**22 + 1):
        with make_engine(**mode, backend=backend, kv_cache_bytes=asked) as engine:
            stats, runner = engine.stats(), engine.core.runner
            kv_dtype = mode["dtype"] if mode["kv_dtype"] == "auto" else "int8"
            assert (stats["quantization"], stats["kv_dtype"]) == (mode["quantization"], kv_dtype)
            assert stats["dtype"] == mode["dtype"]
            head = {"int8": 32 + 4, "bfloat16": 32 * 2, "float32": 32 * 4}[kv_dtype]
            block = engine.core.pool.block_size * 3 * 2 * 2 * head  # layers, keys and values, key heads
            assert stats["kv_cache_bytes"] == stats["kv_blocks_total"] * block
            assert asked - block < stats["kv_cache_bytes"] <= asked
            assert runner.kv_cache.num_bytes == stats["kv_cache_bytes"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("quantization", ["int8", "w8a8"])
def test_closing_frees_memory(make_engine: MakeEngine, quantization: str) -> None:
    def once() -> None:
        with make_engine(quantization=quantization, kv_dtype="int8", kv_cache_bytes=2**24) as engine:
            feed(engine, PROMPT, RESPONSE, 1000)

    def resident_bytes() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    once()
    memory = resident_bytes()
    for _ in range(15):
        once()
    assert resident_bytes() - memory < 2**23  # half of one engine's cache, all of it touched


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int3"}, "quantization='int3': choose None or one of int8, w8a8"),
        ({"quantization": "INT8"}, "quantization='INT8': choose None"),
        ({"quantization": ""}, "quantization='': choose None"),
        ({"kv_dtype": "int3"}, "kv_dtype='int3': choose 'auto', 'float32', 'bfloat16' or 'int8'"),
        ({"kv_dtype": None}, "kv_dtype=None: choose 'auto'"),
        ({"kv_dtype": "int8", "kv_cache_bytes": 1727}, "one block of 4 tokens takes 1728 bytes"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_options_are_refused(make_engine: MakeEngine, backend: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_engine(backend=backend, **options)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"head_dim": 544}, "head_dim is 544: .* 512 at most"),
        (
            {"num_attention_heads": 257, "num_key_value_heads": 1},
            "num_attention_heads / num_key_value_heads is 257: .* 256 at most",
        ),
        ({"intermediate_size": 65568}, "intermediate_size is 65568: .* 65536 at most"),
        (
            {"num_attention_heads": 2052, "num_key_value_heads": 228},
            r"num_attention_heads \* head_dim is 65664",
        ),
        ({"hidden_size": 80}, "hidden_size=80: .* multiple of 32"),
    ],
)
def test_shapes_out_of_range_are_refused(checkpoints, make_engine, overrides, message, quantization) -> None:
    path = checkpoints(vocab_size=VOCAB, num_hidden_layers=1, **overrides)
    with pytest.raises(ConfigError, match=message + ".*use backend='reference'"):
        make_engine(path, quantization=quantization, kv_dtype="int8")
    if "intermediate_size" not in overrides:
        with make_engine(path, quantization=quantization, kv_dtype="int8", backend="reference") as engine:
            assert feed(engine, [1, 2], [3, 4], 2).shape[0] == 2
