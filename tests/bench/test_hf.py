"""The transformers side of the comparisons agrees with itself however it is fed, and with the heads' formula."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from guardengine.bench.hf import GuardOutput, HFGuard, IncrementalStream
from guardengine.errors import CheckpointError, ConfigError

LOGITS = ("risk_level_logits", "category_logits", "query_risk_level_logits", "query_category_logits")
IDS = torch.arange(3, 40) * 7 % 512


def assert_same(actual: GuardOutput, expected: GuardOutput, atol: float = 1e-5) -> None:
    for name in LOGITS:
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def hf(tiny: Path) -> HFGuard:
    return HFGuard(tiny)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("k", [1, 5, 37])
def test_incremental_is_one_shot(tiny: Path, attn: str, k: int) -> None:
    hf = HFGuard(tiny, attn_implementation=attn)
    stream = IncrementalStream(hf)
    outputs = [stream.append(IDS[i : i + k]) for i in range(0, len(IDS), k)]
    together = GuardOutput(*(torch.cat([getattr(o, name) for o in outputs], dim=1) for name in LOGITS))
    assert_same(together, hf.forward(IDS[None]))
    assert stream.num_tokens == len(IDS)


def test_fork_is_independent(hf: HFGuard) -> None:
    stream = IncrementalStream(hf)
    stream.append(IDS[:20])
    branch = stream.fork()
    branch.append(IDS[:3])
    assert (stream.num_tokens, branch.num_tokens) == (20, 23)
    assert_same(stream.append(IDS[20:25]), hf.forward(IDS[None, :25], logits_to_keep=5))


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(hf: HFGuard, side: str) -> None:
    lengths = (37, 20, 1)
    ids = torch.zeros(len(lengths), 37, dtype=torch.long)
    mask = torch.zeros_like(ids)
    spans = [slice(0, n) if side == "right" else slice(37 - n, 37) for n in lengths]
    for row, span in enumerate(spans):
        ids[row, span], mask[row, span] = IDS[: lengths[row]], 1
    padded = hf.forward(ids, attention_mask=mask)  # rotary embeddings are relative: a row may start anywhere
    for row, span in enumerate(spans):
        part = GuardOutput(*(getattr(padded, name)[row : row + 1, span] for name in LOGITS))
        assert_same(part, hf.forward(IDS[None, : lengths[row]]))


def test_position_ids_are_relative_and_used(hf: HFGuard) -> None:
    expected, positions = hf.forward(IDS[None]), torch.arange(len(IDS))[None]
    assert_same(hf.forward(IDS[None], position_ids=positions + 9), expected, atol=1e-4)
    with pytest.raises(AssertionError):
        assert_same(hf.forward(IDS[None], position_ids=positions * 3), expected, atol=1e-2)


def test_logits_to_keep(hf: HFGuard) -> None:
    everything, last = hf.forward(IDS[None]), hf.released_step(IDS, logits_to_keep=1)
    assert_same(last, GuardOutput(*(getattr(everything, name)[:, -1:] for name in LOGITS)))


def test_heads_follow_the_formula(hf: HFGuard, tiny: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    h = hf.model(input_ids=IDS[None]).last_hidden_state
    expected = []
    for prefix in ("", "query_"):
        x = h @ weights[f"{prefix}risk_level_category_pre.weight"].T
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        x = x * weights[f"{prefix}risk_level_category_layernorm.weight"]
        expected += [x @ weights[f"{prefix}{head}_head.weight"].T for head in ("risk_level", "category")]
    assert_same(hf.forward(IDS[None]), GuardOutput(*expected))


@pytest.mark.parametrize(("role", "prefix"), [("user", "query_"), ("assistant", "")])
def test_released_call_labels_every_position(hf: HFGuard, role: str, prefix: str) -> None:
    result = hf.released_call(IDS, role)
    assert list(result) == ["risk_level", "risk_prob", "category", "category_prob"]
    assert {len(values) for values in result.values()} == {len(IDS)}
    logits = getattr(hf.forward(IDS[None]), f"{prefix}risk_level_logits")[0]
    risks = ("Safe", "Unsafe", "Controversial")
    assert result["risk_level"] == [risks[int(row.argmax())] for row in logits]
    assert result["risk_prob"][-1] == round(float(logits[-1].softmax(-1).max()), 2)


def test_both_generations_of_config_names_and_shards(checkpoints: Callable[..., Path], tiny: Path) -> None:
    expected = HFGuard(tiny).forward(IDS[None])
    new_names = checkpoints(vocab_size=512, dtype="float32", config_names="v5")
    shards = checkpoints(vocab_size=512, dtype="float32", max_shard_bytes=100_000)
    assert (shards / "model.safetensors.index.json").exists()
    for folder in (new_names, shards):
        assert_same(HFGuard(folder).forward(IDS[None]), expected, atol=0)


def test_rope_theta_of_either_name_is_used(tiny: Path, tmp_path: Path) -> None:
    """The base is read from the file, wherever it stands: another one gives other logits."""
    outputs = []
    for names in ({"rope_theta": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}):
        folder = tmp_path / str(len(outputs))
        shutil.copytree(tiny, folder)
        raw = json.loads((tiny / "config.json").read_text())
        raw = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling")} | names
        (folder / "config.json").write_text(json.dumps(raw))
        outputs.append(HFGuard(folder).forward(IDS[None]))
    assert_same(outputs[0], outputs[1], atol=0)
    with pytest.raises(AssertionError):
        assert_same(outputs[0], HFGuard(tiny).forward(IDS[None]))


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_stored_dtype_is_converted(checkpoints: Callable[..., Path], stored: str) -> None:
    folder = checkpoints(vocab_size=512, dtype=stored)
    wide, narrow = HFGuard(folder), HFGuard(folder, dtype=torch.bfloat16)
    assert narrow.forward(IDS[None]).risk_level_logits.dtype == torch.bfloat16
    difference = wide.forward(IDS[None]).risk_level_logits - narrow.forward(IDS[None]).risk_level_logits
    assert difference.abs().max() < 0.5  # the same model, coarsely


def test_errors_name_the_mend(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        HFGuard(tmp_path)
    shutil.copy(tiny / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="download the whole checkpoint"):
        HFGuard(tmp_path)
    with pytest.raises(ConfigError, match="'sdpa' or 'eager'"):
        HFGuard(tiny, attn_implementation="fast")
    monkeypatch.setitem(sys.modules, "transformers.models.qwen3", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[bench\]'"):
        HFGuard(tiny)
