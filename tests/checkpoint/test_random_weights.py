"""make_checkpoint: the released layout, the same bytes every time, all or nothing, and lively labels."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

import guardengine.checkpoint.random_weights
import guardengine.text.vocabulary
from guardengine import Engine
from guardengine.checkpoint.files import open_checkpoint
from guardengine.checkpoint.random_weights import PRESETS, make_checkpoint
from guardengine.checkpoint.weights import tensor_shapes
from guardengine.errors import ConfigError
from guardengine.kernels import reference
from guardengine.labels import Label

SMALL = {"vocab_size": 512}


def test_config_is_the_published_one(tmp_path: Path) -> None:
    """All sizes of Stream-0.6B but the number of layers and tokens, which only make the file large."""
    folder = make_checkpoint(tmp_path / "x", "stream-0.6b", num_hidden_layers=1, vocab_size=64)
    raw = json.loads((folder / "config.json").read_text())
    risks = {"0": "Safe", "1": "Unsafe", "2": "Controversial"}
    names = [
        "Violent",
        "Sexual Content",
        "Self-Harm",
        "Political",
        "PII",
        "Copyright",
        "Illegal Acts",
        "Unethical",
        "Jailbreak",
    ]
    categories = {str(index): name for index, name in enumerate(names)}
    assert raw | {"num_hidden_layers": 28, "vocab_size": 151936, "max_window_layers": 28} == {
        "architectures": ["Qwen3ForGuardModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_qwen3.Qwen3Config",
            "AutoModel": "modeling_qwen3_guard.Qwen3ForGuardModel",
        },
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "guard_inner_size": 512,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 8192,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_category": 8,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "num_query_category": 9,
        "num_query_risk_level": 3,
        "num_risk_level": 3,
        "query_category_map": categories,
        "query_risk_level_map": risks,
        "response_category_map": {index: name for index, name in categories.items() if name != "Jailbreak"},
        "response_risk_level_map": risks,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.55.0",
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_writes_what_its_config_asks_for(tmp_path: Path, preset: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 8, "head_dim": 8}
    folder = make_checkpoint(tmp_path / "x", preset, num_hidden_layers=1, vocab_size=64, **sizes)
    with open_checkpoint(folder) as checkpoint:
        shapes = tensor_shapes(checkpoint.config)
        assert checkpoint.config.kind == preset.split("-")[0]
        if checkpoint.config.kind == "gen":
            shapes["lm_head.weight"] = (64, 16)
        assert {name: checkpoint.entry(name).shape for name in checkpoint.tensor_names} == shapes
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert (8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")) % 8 == 0


def test_larger_presets_have_the_published_sizes() -> None:
    keys = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "tie_word_embeddings",
    )
    assert [PRESETS["stream-4b"][key] for key in keys] == [2560, 36, 32, 9728, True]
    assert [PRESETS["stream-8b"][key] for key in keys] == [4096, 36, 32, 12288, False]
    assert [PRESETS["gen-0.6b"][key] for key in keys] == [1024, 28, 16, 3072, True]
    assert {(PRESETS[name]["num_key_value_heads"], PRESETS[name]["head_dim"]) for name in PRESETS} == {
        *((8, 128), (2, 32)),
    }


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)],
)
def test_dtype_is_written_and_values_are_normal(tmp_path: Path, dtype: str, stored: torch.dtype) -> None:
    folder = make_checkpoint(tmp_path / "x", "stream-tiny", dtype=dtype, **SMALL)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == dtype
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {stored}
    for name, tensor in tensors.items():
        assert tensor.isfinite().all(), name
        assert len(tensor.unique()) > 1, name
    wide = tensors["model.layers.0.mlp.gate_proj.weight"].float()
    assert abs(wide.mean()) < 0.005
    assert wide.std() == pytest.approx(0.64 / 64**0.5, rel=0.05)
    assert 0.8 < tensors["model.norm.weight"].float().mean() < 1.2


def test_weight_std_sets_the_linear_layers(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "x", "stream-tiny", weight_std=0.5, **SMALL)
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.0.mlp.gate_proj.weight"].float().std() == pytest.approx(0.5, rel=0.05)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_same_seed_same_bytes_on_every_machine(tmp_path: Path) -> None:
    a = digests(make_checkpoint(tmp_path / "a", "stream-tiny", seed=3, **SMALL))
    assert a == digests(make_checkpoint(tmp_path / "b", "stream-tiny", seed=3, **SMALL))
    assert a != digests(make_checkpoint(tmp_path / "c", "stream-tiny", seed=4, **SMALL))
    assert a["model.safetensors"] == "a1d5fc52d8059f7f1b24b903578d3d3e127a53130a4ce90d25e3220a830910bd"


def test_a_tensor_depends_on_its_name_and_not_on_its_neighbours(tmp_path: Path) -> None:
    few = load_file(
        make_checkpoint(tmp_path / "a", "stream-tiny", num_hidden_layers=1, **SMALL) / "model.safetensors"
    )
    many = load_file(make_checkpoint(tmp_path / "b", "stream-tiny", **SMALL) / "model.safetensors")
    assert set(few) < set(many)
    for name, tensor in few.items():
        assert torch.equal(tensor, many[name]), name
    gate = many["model.layers.0.mlp.gate_proj.weight"]
    assert not torch.equal(gate, many["model.layers.1.mlp.gate_proj.weight"])
    assert not torch.equal(gate, many["model.layers.0.mlp.up_proj.weight"])


def test_chunked_generation_leaves_no_seam(tmp_path: Path) -> None:
    """Tensors of more values than are made at a time, and of a number no draw of four divides."""
    folder = make_checkpoint(
        tmp_path / "x", "stream-tiny", num_hidden_layers=1, vocab_size=16411, hidden_size=65
    )
    embed = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert embed.shape == (16411, 65)  # 1066715 values
    assert not torch.equal(embed.flatten()[:1000], embed.flatten()[2**20 : 2**20 + 1000])
    assert embed.flatten()[-1000:].float().std() > 0.1


def test_shards_keep_to_their_limit_and_to_the_index(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "x", "stream-tiny", max_shard_bytes=100_000, **SMALL)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    tensors = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {name: file for file, found in tensors.items() for name in found}
    sizes = [sum(t.nbytes for t in found.values()) for found in tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert max(sizes) <= 100_000


@pytest.mark.parametrize("config_names", ["v4", "v5"])
def test_transformers_takes_the_backbone(tmp_path: Path, config_names: str) -> None:
    folder = make_checkpoint(tmp_path / "x", "stream-tiny", config_names=config_names, **SMALL)
    config = Qwen3Config.from_pretrained(folder)
    assert config.rope_parameters["rope_theta"] == 1000000
    model = Qwen3Model(config)
    tensors = load_file(folder / "model.safetensors")
    backbone = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    model.load_state_dict(backbone, strict=True)
    assert len(tensors) == len(backbone) + 8


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_takes_a_gen_checkpoint(tmp_path: Path, tied: bool) -> None:
    folder = make_checkpoint(tmp_path / "x", "gen-tiny", tie_word_embeddings=tied, **SMALL)
    model, report = Qwen3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) == tied


def test_labels_differ_between_tokens(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "x", "stream-tiny", dtype="float32", **SMALL)
    model = Qwen3Model(Qwen3Config.from_pretrained(folder)).eval()
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    ids = torch.randint(0, 512, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model(ids).last_hidden_state[0]
    for prefix, num_categories in (("", 8), ("query_", 9)):
        x = hidden @ tensors[f"{prefix}risk_level_category_pre.weight"].T
        x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        x = x * tensors[f"{prefix}risk_level_category_layernorm.weight"]
        risk, category = (
            x @ tensors[f"{prefix}risk_level_head.weight"].T,
            x @ tensors[f"{prefix}category_head.weight"].T,
        )
        assert risk.argmax(-1).bincount(minlength=3).min() >= 10
        assert len(category.argmax(-1).unique()) >= num_categories - 2
        assert 0.5 < risk.std() < 5


# Outliers


def input_rms(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[torch.Tensor]], list[Label]]:
    """Each channel's rms in the inputs of each layer's four matrices, past the first token, and the labels."""
    inputs: list[torch.Tensor] = []
    linear = reference.linear

    def spy(x: torch.Tensor, weight: Any) -> torch.Tensor:
        inputs.append(x)
        return linear(x, weight)

    monkeypatch.setattr(reference, "linear", spy)
    generator = torch.Generator().manual_seed(0)
    ids = [0, *torch.randint(1, 512, (199,), generator=generator).tolist()]
    with Engine.from_pretrained(folder, backend="reference", kv_cache_bytes=2**22) as engine:
        engine.open(token_ids=ids, role="assistant")
        labels = engine.run()
    rms = [x[1:].float().square().mean(0).sqrt() for x in inputs[:-1]]  # the last one is the heads'
    return [rms[start : start + 4] for start in range(0, len(rms), 4)], labels


def peak(rms: torch.Tensor) -> float:
    return float(rms.max() / rms.median())


def test_outliers_show_in_what_quantized_matrices_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "x", "stream-tiny", outliers=True, num_hidden_layers=6, **SMALL)
    layers, labels = input_rms(folder, monkeypatch)
    assert len(layers) == 6
    for qkv, o, gate_up, down in layers:
        assert all(rms.isfinite().all() for rms in (qkv, o, gate_up, down))
        assert peak(qkv) > 10
        assert peak(gate_up) > 10
        assert peak(down) > 10
    outliers = {tuple(sorted(qkv.topk(2).indices.tolist())) for qkv, *_ in layers}
    assert len(outliers) == 1  # the same channels in every layer
    assert all(np.isfinite(label.risk_logits).all() for label in labels)
    risks = Counter(label.risk for label in labels)
    assert len(risks) == 3
    assert min(risks.values()) >= 10
    assert len({label.category for label in labels}) >= 6


def test_without_outliers_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "x", "stream-tiny", num_hidden_layers=6, **SMALL)
    layers, _ = input_rms(folder, monkeypatch)
    assert max(peak(rms) for layer in layers for rms in layer) < 10


def test_the_first_token_is_massive(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "x", "stream-tiny", outliers=True, **SMALL)
    embed = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].float()
    channels = embed.abs().median(0).values.topk(2).indices
    assert embed[1:, channels].abs().mean() == pytest.approx(40, rel=0.1)
    assert embed[0, channels].abs().min() > 10 * embed[1:, channels].abs().mean()
    rest = [channel for channel in range(64) if channel not in channels]
    assert embed[:, rest].std() == pytest.approx(1, rel=0.05)


def test_outliers_are_the_same_on_every_machine(tmp_path: Path) -> None:
    a = digests(make_checkpoint(tmp_path / "a", "stream-tiny", seed=3, outliers=True, **SMALL))
    assert a == digests(make_checkpoint(tmp_path / "b", "stream-tiny", seed=3, outliers=True, **SMALL))
    assert a != digests(make_checkpoint(tmp_path / "c", "stream-tiny", seed=4, outliers=True, **SMALL))
    assert a["model.safetensors"] == "bdb1ab473f074f30ff5a5581f966c06ed64e53e6f76c36bc6f0e043c9dc0d95d"


def test_outliers_leave_no_seam_between_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digests(make_checkpoint(tmp_path / "a", "stream-tiny", outliers=True, **SMALL))
    monkeypatch.setattr(guardengine.checkpoint.random_weights, "_CHUNK", 1000)
    assert digests(make_checkpoint(tmp_path / "b", "stream-tiny", outliers=True, **SMALL)) == whole


@pytest.mark.parametrize("tied", [True, False])
def test_a_gen_head_has_outliers_only_where_it_is_the_embedding(tmp_path: Path, tied: bool) -> None:
    folder = make_checkpoint(tmp_path / "x", "gen-tiny", outliers=True, tie_word_embeddings=tied, **SMALL)
    tensors = load_file(folder / "model.safetensors")
    head, embed = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    assert torch.equal(head, embed) == tied
    assert (head.abs().max() > 100) == tied


# Refusals


@pytest.mark.parametrize(
    ("preset", "options", "pattern"),
    [
        ("stream-9b", {}, r"'stream-9b'.*stream-0\.6b.*gen-tiny"),
        ("stream-tiny", {"hiden_size": 3}, r"hiden_size.*takes.*hidden_size"),
        ("gen-tiny", {"guard_inner_size": 3}, r"guard_inner_size; gen-tiny takes"),
        ("stream-tiny", {"hidden_size": 0}, r"hidden_size.* is 0"),
        ("stream-tiny", {"num_key_value_heads": 3}, "must divide"),
        ("stream-tiny", {"dtype": "int8"}, r"dtype='int8'.*bfloat16"),
        ("stream-tiny", {"config_names": "v6"}, "config_names='v6'"),
        ("stream-tiny", {"query_category_map": "abc"}, "query_category_map='abc'"),
        ("stream-tiny", {"query_risk_level_map": ["Good", "Bad"]}, "Safe"),
        ("stream-tiny", {"seed": -1}, "seed=-1"),
        ("stream-tiny", {"max_shard_bytes": 0}, "max_shard_bytes=0"),
        ("stream-tiny", {"weight_std": 0.0}, r"weight_std=0\.0"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, preset: str, options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        make_checkpoint(tmp_path / "x", preset, **options)
    assert not list(tmp_path.iterdir())


def test_own_label_names_are_written(tmp_path: Path) -> None:
    labels = ("Safe", "Unsafe")
    folder = make_checkpoint(tmp_path / "x", "stream-tiny", response_risk_level_map=labels, **SMALL)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config.heads is not None
        assert checkpoint.config.heads.response_risks == labels
        assert checkpoint.entry("risk_level_head.weight").shape == (2, 32)


def test_folder_in_use_is_refused_and_an_empty_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"used is not empty.*give a new or empty folder"):
        make_checkpoint(tmp_path / "used", "stream-tiny", **SMALL)
    with pytest.raises(ConfigError, match=r"notes\.txt is a file; give a new or empty folder"):
        make_checkpoint(tmp_path / "used" / "notes.txt", "stream-tiny", **SMALL)
    assert [file.name for file in (tmp_path / "used").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    make_checkpoint(tmp_path / "link", "stream-tiny", **SMALL)
    assert (tmp_path / "empty" / "model.safetensors").exists()
    make_checkpoint(tmp_path / "new" / "deep" / "x", "stream-tiny", **SMALL)


def test_stopped_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the very last step the folder does not exist; an interrupt takes the half-made one away."""
    seen: list[list[str]] = []

    def stop(*_: Any) -> None:
        seen.append([entry.name for entry in tmp_path.iterdir()])
        raise KeyboardInterrupt

    monkeypatch.setattr(guardengine.text.vocabulary, "write_tokenizer_files", stop)
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "x", "stream-tiny")
    assert len(seen) == len(seen[0]) == 1
    assert seen[0][0].startswith(".x.")
    assert seen[0][0].endswith(".partial")
    assert not list(tmp_path.iterdir())


def test_folder_that_fills_up_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: Any) -> bool:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "notes.txt").write_text("mine")
        return True

    monkeypatch.setattr(guardengine.text.vocabulary, "write_tokenizer_files", fill)
    with pytest.raises(ConfigError, match="is in use now"):
        make_checkpoint(tmp_path / "x", "stream-tiny")
    assert [file.name for file in tmp_path.rglob("*")] == ["x", "notes.txt"]


def test_too_little_disk_space_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 1_000_000_000))
    with pytest.raises(ConfigError, match=r"1\.26 GB.*1\.00 GB are free; make room"):
        make_checkpoint(tmp_path / "x", "stream-0.6b")
    assert not list(tmp_path.iterdir())


def test_disk_error_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        make_checkpoint(tmp_path / "file" / "x", "stream-tiny", **SMALL)


# Tokenizer


@pytest.mark.parametrize("written", [True, False])
def test_tokenizer_goes_along_or_its_absence_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, written: bool
) -> None:
    calls: list[int] = []

    def write(folder: Path, model_max_length: int, kind: str) -> bool:
        calls.append(model_max_length)
        if written:
            (folder / "tokenizer.json").write_text("{}")
        return written

    monkeypatch.setattr(guardengine.text.vocabulary, "write_tokenizer_files", write)
    with caplog.at_level(logging.WARNING, "guardengine"):
        folder = make_checkpoint(tmp_path / "x", "stream-tiny")
    assert calls == [8192]
    assert (folder / "tokenizer.json").exists() == written
    assert ("pip install dashscope" in caplog.text) == (not written)


def test_small_vocabulary_gets_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        guardengine.text.vocabulary, "write_tokenizer_files", lambda *_: pytest.fail("written")
    )
    folder = make_checkpoint(tmp_path / "x", "stream-tiny", vocab_size=151668)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
