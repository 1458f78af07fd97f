"""load_weights: every stored tensor ends where it belongs, at no more memory than the weights need."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as parse
from safetensors.torch import save_file

from guardengine.checkpoint.files import open_checkpoint
from guardengine.checkpoint.model_config import ModelConfig
from guardengine.checkpoint.random_weights import PRESETS, make_checkpoint
from guardengine.checkpoint.weights import LayerWeights, Weights, load_weights, tensor_shapes
from guardengine.errors import CheckpointError, ConfigError

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 40,
}
CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


def make(folder: Path, preset: str = "stream-tiny", **overrides: Any) -> Path:
    sizes = SMALL | ({"guard_inner_size": 8} if preset.startswith("stream") else {})
    return make_checkpoint(folder, preset, **(sizes | overrides))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    with open_checkpoint(folder) as checkpoint:
        return load_weights(checkpoint, dtype, CPU)


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    return make(tmp_path / "stream")


def stored(path: Path) -> Tensors:
    """Read a file with the safetensors library: from bytes, as views on it would follow its changes."""
    return parse(path.read_bytes())


def change(folder: Path, edit: Callable[[Tensors], Any]) -> Path:
    """Rewrite model.safetensors with the safetensors library after an edit of its tensors."""
    tensors = stored(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def assert_holds(weights: Weights, tensors: Tensors, dtype: torch.dtype) -> None:
    """Every fused tensor is exactly its stored parts, cast and in the promised order."""

    def same(actual: torch.Tensor, *names: str) -> None:
        expected = torch.cat([tensors[name] for name in names]).to(dtype)
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        assert torch.equal(actual.flatten(), expected.flatten()), names

    same(weights.embed, "model.embed_tokens.weight")
    same(weights.norm, "model.norm.weight")
    for index, layer in enumerate(weights.layers):
        at = f"model.layers.{index}."
        same(layer.input_norm, at + "input_layernorm.weight")
        same(layer.qkv, *(f"{at}self_attn.{part}_proj.weight" for part in "qkv"))
        same(layer.q_norm, at + "self_attn.q_norm.weight")
        same(layer.k_norm, at + "self_attn.k_norm.weight")
        same(layer.o, at + "self_attn.o_proj.weight")
        same(layer.post_norm, at + "post_attention_layernorm.weight")
        same(layer.gate_up, at + "mlp.gate_proj.weight", at + "mlp.up_proj.weight")
        same(layer.down, at + "mlp.down_proj.weight")
    if weights.heads is not None:
        same(weights.heads.pre, "risk_level_category_pre.weight", "query_risk_level_category_pre.weight")
        norms = ("risk_level_category_layernorm.weight", "query_risk_level_category_layernorm.weight")
        same(weights.heads.norm, *norms)
        assert weights.heads.norm.dim() == 2
        same(weights.heads.response, "risk_level_head.weight", "category_head.weight")
        same(weights.heads.query, "query_risk_level_head.weight", "query_category_head.weight")


def layer_bytes(layer: LayerWeights) -> list[torch.Tensor]:
    return [getattr(layer, name) for name in LayerWeights.__slots__]


# What must be read


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_is_read_and_cast(stream: Path, source: torch.dtype, wanted: torch.dtype) -> None:
    change(stream, lambda tensors: tensors.update({k: v.to(source) for k, v in tensors.items()}))
    assert_holds(load(stream, wanted), stored(stream / "model.safetensors"), wanted)


def test_shapes_of_fused_weights(stream: Path) -> None:
    weights = load(stream)
    layer, heads = weights.layers[1], weights.heads
    assert heads is not None
    assert weights.lm_head is None
    assert [tuple(t.shape) for t in layer_bytes(layer)] == [
        *((16,), (64, 16), (8,), (8,)),
        *((16, 32), (16,), (48, 16), (16, 24)),
    ]
    assert [tuple(t.shape) for t in (heads.pre, heads.norm, heads.response, heads.query)] == [
        *((16, 16), (2, 8), (11, 8), (12, 8)),
    ]


@pytest.mark.parametrize("config_names", ["v4", "v5"])
def test_both_generations_of_config_load(tmp_path: Path, config_names: str) -> None:
    folder = make(tmp_path / "x", config_names=config_names)
    assert ("rope_parameters" in json.loads((folder / "config.json").read_text())) == (config_names == "v5")
    assert open_checkpoint(folder).config == open_checkpoint(make(tmp_path / "y")).config
    assert_holds(load(folder), stored(folder / "model.safetensors"), torch.float32)


@pytest.mark.parametrize("max_shard_bytes", [1, 2000, 8000])
def test_sharded_is_the_same_as_single(tmp_path: Path, stream: Path, max_shard_bytes: int) -> None:
    sharded = make(tmp_path / "sharded", max_shard_bytes=max_shard_bytes)
    assert not (sharded / "model.safetensors").exists()
    with open_checkpoint(sharded) as a, open_checkpoint(stream) as b:
        assert set(a.tensor_names) == set(b.tensor_names)
    assert_holds(load(sharded), stored(stream / "model.safetensors"), torch.float32)


def test_gen_untied_has_its_own_head(tmp_path: Path) -> None:
    folder = make(tmp_path / "gen", "gen-tiny", tie_word_embeddings=False)
    weights, tensors = load(folder), stored(folder / "model.safetensors")
    assert weights.lm_head is not None
    assert weights.heads is None
    assert torch.equal(weights.lm_head, tensors["lm_head.weight"].float())
    assert not torch.equal(weights.lm_head, weights.embed)
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) missing: lm_head\.weight"):
        load(folder)


def test_gen_tied_uses_the_embedding_stored_head_or_not(tmp_path: Path) -> None:
    folder = make(tmp_path / "gen", "gen-tiny")
    tensors = stored(folder / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    change(folder, lambda tensors: tensors["lm_head.weight"].fill_(7))
    weights = load(folder)
    assert weights.lm_head is weights.embed
    assert torch.equal(weights.embed, tensors["model.embed_tokens.weight"].float())
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    weights = load(folder)
    assert weights.lm_head is weights.embed


def test_harmless_extras_are_ignored(stream: Path) -> None:
    extras = {
        "lm_head.weight": torch.zeros(1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    assert load(change(stream, lambda tensors: tensors.update(extras))).lm_head is None


def test_weights_own_their_memory(stream: Path) -> None:
    expected = stored(stream / "model.safetensors")
    weights = load(stream)
    (stream / "model.safetensors").write_bytes(bytes((stream / "model.safetensors").stat().st_size))
    assert_holds(weights, expected, torch.float32)


def config_of(**sizes: int | bool) -> ModelConfig:
    preset = {key: value for key, value in PRESETS["stream-0.6b"].items() if key != "architecture"}
    raw = preset | {"vocab_size": 151936, "rope_theta": 1000000, "architectures": ["Qwen3ForGuardModel"]}
    return ModelConfig.from_dict(raw | sizes)


@pytest.mark.parametrize(
    ("preset", "tensors", "backbone"),
    [
        ("stream-0.6b", 318, 596_049_920),
        ("stream-4b", 406, 4_022_468_096),
        ("stream-8b", 406, 7_568_405_504),
    ],
)
def test_published_sizes_have_the_published_counts(preset: str, tensors: int, backbone: int) -> None:
    sizes = {key: value for key, value in PRESETS[preset].items() if key != "architecture"}
    shapes = tensor_shapes(config_of(**sizes))
    count = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert len(shapes) == tensors
    assert sum(n for name, n in count.items() if name.startswith("model.")) == backbone
    heads = sum(n for name, n in count.items() if not name.startswith("model."))
    assert preset != "stream-0.6b" or heads == 1_061_376


# What must be refused: tensors that do not fit config.json


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 1}, ["layer 1", "num_hidden_layers=1", "config.json"]),
        (
            {"num_hidden_layers": 4},
            ["22 tensor(s) missing", "model.layers.2.input_layernorm.weight", "and 14 more"],
        ),
        (
            {"guard_inner_size": 9},
            ["risk_level_category_pre.weight", "[8, 16]", "[9, 16]", "guard_inner_size"],
        ),
        ({"vocab_size": 41}, ["model.embed_tokens.weight", "[40, 16]", "vocab_size"]),
        ({"head_dim": 4}, ["q_proj.weight", "head_dim"]),
        ({"num_key_value_heads": 4}, ["k_proj.weight", "num_key_value_heads"]),
        ({"intermediate_size": 25}, ["gate_proj.weight", "intermediate_size"]),
        (
            {"num_category": 2, "response_category_map": {"0": "a", "1": "b"}},
            ["category_head.weight", "num_category"],
        ),
        ({"architectures": ["Qwen3ForCausalLM"]}, ["8 tensor(s)", "no gen checkpoint", "architectures"]),
    ],
)
def test_config_that_contradicts_the_tensors(stream: Path, changes: dict[str, Any], words: list[str]) -> None:
    change_config(stream, **changes)
    with pytest.raises(CheckpointError) as caught:
        load(stream)
    for word in [str(stream), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda t: t.pop("model.norm.weight"),
            ["1 tensor(s) missing: model.norm.weight", "download it again"],
        ),
        (lambda t: t.update(adapter=torch.zeros(1)), ["1 tensor(s)", "adapter", "architectures"]),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(16, dtype=torch.int32)}),
            ["model.norm.weight", "I32", "use the published bfloat16 checkpoint"],
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(4, 4)}),
            ["model.norm.weight", "[4, 4]", "[16]"],
        ),
        (
            lambda t: t.update(
                {"model.layers.0.mlp.up_proj.qweight": t.pop("model.layers.0.mlp.up_proj.weight")}
            ),
            ["model.layers.0.mlp.up_proj.weight", "quantized", "use the published bfloat16 checkpoint"],
        ),
        (lambda t: t.clear(), ["32 tensor(s) missing", "and 24 more"]),
    ],
)
def test_tensors_that_do_not_fit(stream: Path, edit: Callable[[Tensors], Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(change(stream, edit))
    for word in [str(stream), *words]:
        assert word in str(caught.value)


def test_missing_tensors_are_told_in_one_message(stream: Path) -> None:
    change_config(stream, num_hidden_layers=4)
    with pytest.raises(CheckpointError) as caught:
        load(stream)
    listed = str(caught.value).partition("missing: ")[2].partition(" and 14 more; ")[0].split(", ")
    assert listed == list(tensor_shapes(config_of(num_hidden_layers=4)))[23:31]


def test_other_dtype_of_weights_is_refused(stream: Path) -> None:
    with pytest.raises(ConfigError, match=r"float64.*bfloat16"):
        load(stream, torch.float64)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, Tensors]:
    folder = make(tmp_path_factory.mktemp("fuzz") / "x", num_hidden_layers=1)
    path = folder / "model.safetensors"
    return folder, path.read_bytes(), stored(path)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_flipped_and_cut_headers_load_right_or_not_at_all(
    fuzzed: tuple[Path, bytes, Tensors], data: st.DataObject
) -> None:
    folder, content, expected = fuzzed
    end = 8 + int.from_bytes(content[:8], "little")
    damaged = bytearray(content)
    for at in data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=3)):
        damaged[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789"{}[]:, ')))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    (folder / "model.safetensors").write_bytes(damaged[:cut])
    try:
        weights = load(folder)
    except CheckpointError:
        return
    assert_holds(weights, expected, torch.float32)


# Memory

MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from guardengine.checkpoint.files import open_checkpoint
from guardengine.checkpoint.random_weights import make_checkpoint
from guardengine.checkpoint.weights import load_weights

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def peak_of(work):
    before, peak, done = anonymous_bytes(), 0, threading.Event()
    def sample():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.0005)
    sampler = threading.Thread(target=sample)
    sampler.start()
    result = work()
    peak = max(peak, anonymous_bytes())
    done.set()
    sampler.join()
    return result, peak - before

torch.set_num_threads(1)
folder = Path(sys.argv[1])
make_checkpoint(folder / "warm", "stream-tiny", vocab_size=64)
sizes = dict(vocab_size=16384, hidden_size=1024, num_hidden_layers=6, num_attention_heads=16,
             num_key_value_heads=8, head_dim=128, intermediate_size=3072, guard_inner_size=512)
_, made = peak_of(lambda: make_checkpoint(folder / "x", "stream-tiny", **sizes))
stored = (folder / "x" / "model.safetensors").stat().st_size
peaks = []
for dtype in (torch.bfloat16, torch.float32):
    def work():
        with open_checkpoint(folder / "x") as checkpoint:
            return load_weights(checkpoint, dtype, torch.device("cpu"))
    weights, peak = peak_of(work)
    peaks.append(peak / (stored * dtype.itemsize / 2))
    del weights
print(stored, made / stored, *peaks)
"""


@pytest.mark.slow
def test_peak_memory_is_the_weights_and_little_more(tmp_path: Path) -> None:
    """Anonymous memory: what the system cannot take back. The mapped file itself is page cache."""
    command = [sys.executable, "-P", "-c", MEASURE, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    size, made, bfloat16, float32 = map(float, run.stdout.split())
    assert 200e6 < size < 300e6
    assert made < 0.25
    assert 0.9 < bfloat16 <= 1.15
    assert 0.9 < float32 <= 1.15
