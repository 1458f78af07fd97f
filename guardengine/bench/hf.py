"""Qwen3Guard-Stream on Hugging Face transformers, with which the engine's labels and speed are compared.

It is transformers' Qwen3Model with the guard heads, loaded from a folder in the released layout. It deliberately
shares no code with the engine: neither its loader nor its operators.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from guardengine.errors import CheckpointError, ConfigError
from guardengine.extras import how_to_install

AttnImplementation = Literal["sdpa", "eager"]

_HEAD_TENSORS = (
    "risk_level_category_pre.weight",
    "risk_level_category_layernorm.weight",
    "risk_level_head.weight",
    "category_head.weight",
    "query_risk_level_category_pre.weight",
    "query_risk_level_category_layernorm.weight",
    "query_risk_level_head.weight",
    "query_category_head.weight",
)


@dataclass(slots=True)
class GuardOutput:
    """The logits of the kept positions, [B, kept, classes] in the model's dtype, and the cache if one was used."""

    risk_level_logits: Tensor
    category_logits: Tensor
    query_risk_level_logits: Tensor
    query_category_logits: Tensor
    past_key_values: Any = None


class HFGuard:
    """A Stream checkpoint on transformers. Everything runs on one device, without gradients."""

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        attn_implementation: AttnImplementation = "sdpa",
        device: str | torch.device = "cpu",
    ) -> None:
        """Load the folder `path`. Raises CheckpointError, and ConfigError when transformers is not installed."""
        qwen3 = import_transformers()
        folder = Path(path)
        raw = _read_json(folder / "config.json")
        self.config = _qwen3_config(raw, folder / "config.json")
        self.dtype = dtype
        tensors = _read_tensors(folder, dtype)
        head_tensors = {name: tensors.pop(name) for name in _HEAD_TENSORS if name in tensors}
        for name in set(_HEAD_TENSORS) - set(head_tensors):
            raise CheckpointError(f"{folder}: `{name}` is missing; a Qwen3Guard-Stream checkpoint has it")
        tensors.pop("lm_head.weight", None)
        # Built without storage, then given the checkpoint's: initialising random weights would take longest.
        with torch.device("meta"):
            model = qwen3.Qwen3Model(self.config)
            heads = _GuardHeads(qwen3.Qwen3RMSNorm, head_tensors, self.config.rms_norm_eps)
        try:
            model.load_state_dict(
                {name.removeprefix("model."): tensor for name, tensor in tensors.items()}, assign=True
            )
            heads.load_state_dict(head_tensors, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"{folder}: config.json and the tensors disagree: {error}") from error
        model.rotary_emb = qwen3.Qwen3RotaryEmbedding(self.config)  # its tables are computed, not stored
        self.device = torch.device(device)
        self.model, self.heads = model.to(self.device).eval(), heads.to(self.device).eval()
        self.label_maps = {
            key: {int(index): str(name) for index, name in raw.get(key, {}).items()}
            for key in (
                "response_risk_level_map",
                "response_category_map",
                "query_risk_level_map",
                "query_category_map",
            )
        }
        self.set_attn_implementation(attn_implementation)

    def set_attn_implementation(self, name: AttnImplementation) -> None:
        """Choose the attention of transformers, "sdpa" or "eager". The weights stay."""
        if name not in ("sdpa", "eager"):
            raise ConfigError(f"attn_implementation={name!r}: choose 'sdpa' or 'eager'")
        self.model.set_attn_implementation(name)
        self.attn_implementation = name

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> GuardOutput:
        """Run the model and all four heads.

        Shapes: input_ids [B, T]; attention_mask [B, T] (1: token, 0: padding) or any that transformers takes;
        logits [B, logits_to_keep, classes], of all T positions where logits_to_keep is 0.
        """
        output = self.model(
            input_ids=input_ids.to(self.device),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        hidden = output.last_hidden_state[:, slice(-logits_to_keep, None)]
        risk, category, query_risk, query_category = self.heads(hidden)
        return GuardOutput(risk, category, query_risk, query_category, output.past_key_values)

    __call__ = forward

    def released_step(self, ids: Tensor, logits_to_keep: int = 0) -> GuardOutput:
        """Compute like the released code for each token: the whole sequence `ids` [N] again, without a cache."""
        return self.forward(ids[None], logits_to_keep=logits_to_keep)

    @torch.inference_mode()
    def released_call(self, ids: Tensor, role: Literal["user", "assistant"]) -> dict[str, list[Any]]:
        """Do the work of one `stream_moderate_from_ids` of the released code when the stream has the tokens `ids` [N].

        That is all four heads at all positions, then softmax, maximum and four Python lists over all of them. The
        causal mask is left to the attention kernel, which is faster than the released code's own.
        """
        out = self.released_step(ids)
        query = role == "user"
        risk = out.query_risk_level_logits if query else out.risk_level_logits
        category = out.query_category_logits if query else out.category_logits
        prefix = "query" if query else "response"
        result: dict[str, list[Any]] = {}
        for name, logits in (("risk_level", risk), ("category", category)):
            names = self.label_maps[f"{prefix}_{name}_map"]
            prob, index = logits[0].softmax(-1).max(-1)
            result[name] = [names.get(i, str(i)) for i in index.tolist()]
            result[name.replace("_level", "") + "_prob"] = [round(p, 2) for p in prob.tolist()]
        return {key: result[key] for key in ("risk_level", "risk_prob", "category", "category_prob")}


class IncrementalStream:
    """One conversation on transformers' own KV cache: a DynamicCache, and a forward over the new tokens of each
    call."""

    def __init__(self, guard: HFGuard) -> None:
        self._guard = guard
        self._cache: Any = None

    def append(self, ids: Tensor | Sequence[int], logits_to_keep: int = 0) -> GuardOutput:
        """Feed the next k tokens, [k]; returns their logits."""
        output = self._guard.forward(
            torch.as_tensor(ids)[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )
        self._cache = output.past_key_values
        return output

    def fork(self) -> IncrementalStream:
        """A branch with its own copy of the cache."""
        branch = IncrementalStream(self._guard)
        branch._cache = copy.deepcopy(self._cache)
        return branch

    @property
    def num_tokens(self) -> int:
        return int(self._cache.get_seq_length()) if self._cache is not None else 0


class _GuardHeads(nn.Module):
    """The two branches of the released code: projection, RMSNorm, then a risk head and a category head."""

    def __init__(self, rms_norm: Any, tensors: Mapping[str, Tensor], eps: float) -> None:
        super().__init__()
        for name in _HEAD_TENSORS:
            shape = tensors[name].shape
            module: nn.Module
            if name.endswith("_layernorm.weight"):
                module = rms_norm(shape[0], eps=eps)
            else:
                module = nn.Linear(shape[1], shape[0], bias=False)
            self.add_module(name.removesuffix(".weight"), module)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        part = self.get_submodule
        x = part("risk_level_category_layernorm")(part("risk_level_category_pre")(hidden))
        xq = part("query_risk_level_category_layernorm")(part("query_risk_level_category_pre")(hidden))
        return (
            part("risk_level_head")(x),
            part("category_head")(x),
            part("query_risk_level_head")(xq),
            part("query_category_head")(xq),
        )


def import_transformers() -> Any:
    """The Qwen3 module of transformers, imported only for a comparison. Raises ConfigError when it is not installed."""
    try:
        from transformers.models.qwen3 import modeling_qwen3
    except ImportError as error:
        raise ConfigError(
            f"the comparison needs transformers, which cannot be imported ({error}); "
            f"{how_to_install('bench')}"
        ) from error
    return modeling_qwen3


def _qwen3_config(raw: Mapping[str, Any], source: Path) -> Any:
    """A configuration of transformers 5, from a config.json with the older or the newer names."""
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "attention_bias",
    )
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = raw.get("rope_theta", rope.get("rope_theta"))
    missing = [key for key in keys[:5] if key not in raw] + ([] if theta else ["rope_theta"])
    if missing:
        raise CheckpointError(f"{source}: {', '.join(missing)} missing; restore the published config.json")
    rope = {"rope_type": rope.pop("type", "default"), **rope, "rope_theta": float(theta)}
    return Qwen3Config(
        **{key: raw[key] for key in keys if raw.get(key) is not None},
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        rope_parameters=rope,
        use_cache=False,
        tie_word_embeddings=False,  # there is no language model head to tie
    )


def _read_tensors(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    files = sorted(set(_read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file}: no such file; download the whole checkpoint")
        with safe_open(folder / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (a file, not a dict)
                # A copy of its own: a view of the mapped file would be paged in while something is timed.
                tensors[name] = shard.get_tensor(name).to(dtype, copy=True)
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); download the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
