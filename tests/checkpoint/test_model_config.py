"""ModelConfig: both generations of config.json, the published sizes, and every lie a config can tell."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardengine.checkpoint.model_config import QUERY_CATEGORIES, RESPONSE_CATEGORIES, RISKS, ModelConfig
from guardengine.config import EngineConfig
from guardengine.errors import CheckpointError, ConfigError

STREAM_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForGuardModel"],
    "model_type": "qwen3",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "guard_inner_size": 512,
    "num_risk_level": 3,
    "num_category": 8,
    "num_query_risk_level": 3,
    "num_query_category": 9,
    "response_risk_level_map": {str(i): name for i, name in enumerate(RISKS)},
    "query_risk_level_map": {str(i): name for i, name in enumerate(RISKS)},
    "response_category_map": {str(i): name for i, name in enumerate(RESPONSE_CATEGORIES)},
    "query_category_map": {str(i): name for i, name in enumerate(QUERY_CATEGORIES)},
}


def without(*keys: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (STREAM_0_6B | changes).items() if key not in keys}


def test_published_stream_config() -> None:
    config = ModelConfig.from_dict(STREAM_0_6B)
    assert config.kind == "stream"
    assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads) == (1024, 28, 16, 8)
    assert (config.head_dim, config.intermediate_size, config.vocab_size) == (128, 3072, 151936)
    assert (config.rope_theta, config.rms_norm_eps, config.dtype) == (1e6, 1e-6, "bfloat16")
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (8192, True)
    assert config.heads is not None
    assert config.heads.num_logits == 23
    assert config.heads.inner_size == 512
    assert config.heads.response_risks == config.heads.query_risks == ("Safe", "Unsafe", "Controversial")
    assert config.heads.response_categories == RESPONSE_CATEGORIES
    assert config.heads.query_categories == QUERY_CATEGORIES
    assert config.heads.query_categories[8] == "Jailbreak"


def test_gen_config_has_no_heads() -> None:
    config = ModelConfig.from_dict(without("guard_inner_size", architectures=["Qwen3ForCausalLM"]))
    assert config.kind == "gen"
    assert config.heads is None


def test_both_generations_of_names_mean_the_same() -> None:
    new = without("rope_theta", "rope_scaling", "torch_dtype")
    new |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
        "dtype": "bfloat16",
        "layer_types": ["full_attention"] * 28,
    }
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(STREAM_0_6B)


def test_top_level_rope_theta_comes_first() -> None:
    raw = STREAM_0_6B | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    assert ModelConfig.from_dict(raw).rope_theta == 1e6


def test_labels_follow_their_indices_not_the_order_of_the_file() -> None:
    raw = STREAM_0_6B | {"query_risk_level_map": {"2": "Controversial", "0": "Safe", "1": "Unsafe"}}
    config = ModelConfig.from_dict(raw)
    assert config.heads is not None
    assert config.heads.query_risks == RISKS


def test_absent_label_maps_get_the_published_names() -> None:
    maps = [key for key in STREAM_0_6B if key.endswith("_map")]
    assert ModelConfig.from_dict(without(*maps)) == ModelConfig.from_dict(STREAM_0_6B)


def test_head_dim_is_read_not_derived() -> None:
    assert ModelConfig.from_dict(STREAM_0_6B).head_dim == 128  # not 1024 / 16
    assert ModelConfig.from_dict(without("head_dim")).head_dim == 64
    assert ModelConfig.from_dict(STREAM_0_6B | {"head_dim": None}).head_dim == 64


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", None),
        ("architectures", []),
        ("architectures", ["LlamaForCausalLM"]),
        ("architectures", [["Qwen3ForGuardModel"]]),
        ("model_type", "qwen3_moe"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("quantization_config", {"quant_method": "fp8"}),
        ("layer_types", ["sliding_attention"]),
        ("layer_types", [["full_attention"]]),
        ("layer_types", "full_attention"),
        ("hidden_size", None),
        ("hidden_size", 0),
        ("hidden_size", -1),
        ("hidden_size", True),
        ("hidden_size", "1024"),
        ("hidden_size", 1024.0),
        ("hidden_size", 2**31),
        ("num_hidden_layers", 1025),
        ("num_key_value_heads", 3),
        ("head_dim", 127),
        ("vocab_size", None),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", -1),
        ("rope_theta", float("inf")),
        ("rope_theta", 10**400),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
        ("rope_parameters", [1]),
        ("torch_dtype", "float64"),
        ("torch_dtype", ["bfloat16"]),
        ("tie_word_embeddings", "yes"),
        ("guard_inner_size", None),
        ("num_category", 7),
        ("num_query_category", 2**31 - 1),
        ("query_category_map", {"0": "a"}),
        ("query_risk_level_map", ["Safe", "Unsafe", "Controversial"]),
        ("query_risk_level_map", {"0": "Safe", "1": "Unsafe", "3": "Controversial"}),
        ("query_risk_level_map", {"0": "Safe", "1": "Unsafe", "two": "Controversial"}),
        ("query_risk_level_map", {"0": "Safe", "1": "Unsafe", "01": "Controversial"}),
        ("query_risk_level_map", {"0": "Safe", "1": "Safe", "2": "Controversial"}),
        ("query_risk_level_map", {"0": "Safe", "1": "", "2": "Controversial"}),
        ("response_risk_level_map", {"0": "Good", "1": "Unsafe", "2": "Controversial"}),
    ],
)
def test_bad_value_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(STREAM_0_6B | {key: value}, "folder/config.json")
    message = str(caught.value)
    assert message.startswith("folder/config.json: `")
    assert "; " in message
    assert len(message) < 1000
    # A count that contradicts its map may be named by the map.
    assert key in message or key.removeprefix("num_") in message


def test_yarn_beside_default_rope_parameters_is_refused() -> None:
    raw = STREAM_0_6B | {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn"}}
    with pytest.raises(CheckpointError, match="rope_scaling"):
        ModelConfig.from_dict(raw)


def test_missing_rope_theta_is_refused() -> None:
    with pytest.raises(CheckpointError, match="rope_theta"):
        ModelConfig.from_dict(without("rope_theta"))


def test_a_count_without_a_map_is_refused() -> None:
    with pytest.raises(CheckpointError, match="response_category_map"):
        ModelConfig.from_dict(without("response_category_map", num_category=7))


def test_config_that_is_no_object_is_refused() -> None:
    with pytest.raises(CheckpointError, match="JSON object"):
        ModelConfig.from_dict([1])  # type: ignore[arg-type]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
KEYS = [*STREAM_0_6B, "rope_parameters", "layer_types", "dtype", "quantization_config"]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, min_size=1, max_size=4))
def test_any_json_is_a_config_or_a_checkpoint_error(changes: dict[str, Any]) -> None:
    try:
        config = ModelConfig.from_dict(STREAM_0_6B | changes)
    except CheckpointError:
        return
    assert config.num_heads % config.num_kv_heads == 0
    assert config.head_dim % 2 == 0


def test_engine_options_unknown_or_out_of_range_are_refused() -> None:
    assert EngineConfig.from_options({"block_size": 8}).block_size == 8
    with pytest.raises(ConfigError, match=r"blok_size.*block_size"):
        EngineConfig.from_options({"blok_size": 8})
    with pytest.raises(ConfigError, match=r"block_size=0.*1 to 1024"):
        EngineConfig.from_options({"block_size": 0})
    with pytest.raises(ConfigError, match="kv_dtype='int3'"):
        EngineConfig.from_options({"kv_dtype": "int3"})
