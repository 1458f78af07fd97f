"""ModelConfig: the shape of a model, read from config.json and checked.

Knows no tensors, and no files: it is given the content. Errors name the key, the value and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from guardengine import checks
from guardengine.errors import CheckpointError

RISKS = ("Safe", "Unsafe", "Controversial")
QUERY_CATEGORIES = (
    "Violent",
    "Sexual Content",
    "Self-Harm",
    "Political",
    "PII",
    "Copyright",
    "Illegal Acts",
    "Unethical",
    "Jailbreak",
)
RESPONSE_CATEGORIES = QUERY_CATEGORIES[:-1]

_LARGEST_FLOAT = 1e30  # of any float in config.json: all of them are used in float32

# The architectures this engine runs, and what each one's extra weights are.
ARCHITECTURES: dict[str, Literal["stream", "gen"]] = {
    "Qwen3ForGuardModel": "stream",
    "Qwen3ForCausalLM": "gen",
}


@dataclass(frozen=True, slots=True)
class GuardHeadsConfig:
    """The two pairs of classification heads of a Stream checkpoint. Names are in the order of the logits.

    Attributes:
        inner_size: Width of the heads' hidden layer.
        response_risks: Names of the risks of responses.
        response_categories: Names of the categories of responses.
        query_risks: Names of the risks of prompts.
        query_categories: Names of the categories of prompts.
    """

    inner_size: int
    response_risks: tuple[str, ...]
    response_categories: tuple[str, ...]
    query_risks: tuple[str, ...]
    query_categories: tuple[str, ...]

    @property
    def num_logits(self) -> int:
        """How many logits the four heads have together."""
        return (
            len(self.response_risks)
            + len(self.response_categories)
            + len(self.query_risks)
            + len(self.query_categories)
        )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Qwen3Guard model.

    Attributes:
        kind: "stream" for a checkpoint with classification heads, "gen" for one that answers in text.
        hidden_size: Width of the hidden states.
        num_layers: Number of decoder layers.
        num_heads: Number of query heads.
        num_kv_heads: Number of key and value heads; divides num_heads.
        head_dim: Width of a head, even.
        intermediate_size: Width of the MLP.
        vocab_size: Number of rows of the embedding.
        rms_norm_eps: The epsilon of RMSNorm.
        rope_theta: The base of the rotary embedding's frequencies.
        max_position_embeddings: The longest context that the model was trained for, in tokens.
        tie_word_embeddings: Whether the embedding is also the output matrix (Gen).
        dtype: The dtype of the stored weights, as config.json states it.
        heads: The classification heads; None for Gen checkpoints.
    """

    kind: Literal["stream", "gen"]
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: Literal["float32", "bfloat16", "float16"]
    heads: GuardHeadsConfig | None

    @staticmethod
    def from_dict(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Read a config.json, with the older or the newer names of keys (`rope_theta` or `rope_parameters`,
        `torch_dtype` or `dtype`).

        Args:
            raw: The parsed content of the file.
            source: The name of the file, for errors.

        Raises:
            CheckpointError: A key is missing, has a value that is not valid, or asks for a model that this engine does
                not run.
        """
        return _Reader(raw, source).model_config()


class _Reader:
    """Typed access to the keys of config.json. Errors name the file, the key, the value and what to do."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{source}: expected a JSON object, found {type(raw).__name__}")
        self.raw, self.source = raw, source

    def fail(self, key: str, problem: str, mend: str) -> CheckpointError:
        if len(problem) > 300:
            problem = f"{problem[:297]}..."
        return CheckpointError(f"{self.source}: `{key}` {problem}; {mend}")

    def positive_int(self, key: str, default: int | None = None, largest: int = 2**31 - 1) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(key, "is missing", "restore the key from the published config.json")
        if not checks.is_whole_number(value, 1, largest):
            raise self.fail(key, f"is {value!r}", f"it must be a whole number from 1 to {largest}")
        return value

    def positive_float(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _LARGEST_FLOAT:
            raise self.fail(key, f"is {value!r}", f"it must be a number above 0 and below {_LARGEST_FLOAT:g}")
        return float(value)

    def must_be(self, key: str, supported: Any, why: str) -> None:
        value = self.raw.get(key, supported)
        if value is not None and value != supported:
            raise self.fail(key, f"is {value!r}", f"only {supported!r} is supported: {why}")

    def rope_theta(self) -> float:
        theta = self.raw.get("rope_theta")
        for key in ("rope_parameters", "rope_scaling"):
            rope = self.raw.get(key)
            if rope is None:
                continue
            if not isinstance(rope, Mapping):
                raise self.fail(key, f"is {rope!r}", "it must be an object with `rope_theta`")
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind != "default":
                raise self.fail(key, f"has rope_type {kind!r}", "only 'default' (unscaled) RoPE is supported")
            theta = rope.get("rope_theta") if theta is None else theta
        if theta is None:
            raise self.fail(
                "rope_theta",
                "is missing",
                "state it at the top level or in `rope_parameters` (Qwen3: 1000000)",
            )
        return self.positive_float("rope_theta", theta)

    def dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        key = "torch_dtype" if self.raw.get("dtype") is None else "dtype"
        value = self.raw.get(key, "bfloat16")
        if value not in ("float32", "bfloat16", "float16"):
            raise self.fail(key, f"is {value!r}", "it must be float32, bfloat16 or float16")
        return value  # type: ignore[no-any-return]

    def label_names(self, key: str, count_key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        """Names in the order of the logits: the map in the file, whose keys are "0", "1", ..., or the published short
        names."""
        count = self.positive_int(count_key, len(default))
        names = self.raw.get(key)
        if names is None:
            if count != len(default):
                raise self.fail(count_key, f"is {count}", f"add `{key}` to name the {count} classes")
            return default
        if not isinstance(names, Mapping) or not all(isinstance(v, str) and v for v in names.values()):
            raise self.fail(key, f"is {names!r}", 'it must be an object such as {"0": "Safe", ...}')
        by_index = {str(index): name for index, name in names.items()}
        labels = tuple(by_index.get(str(index), "") for index in range(len(names)))
        if len(labels) != count or "" in labels or len(set(labels)) != count:
            mend = f"it must have distinct names for the indices 0 to {count - 1} (`{count_key}`)"
            raise self.fail(key, f"names {names!r}", mend)
        return labels

    def heads(self) -> GuardHeadsConfig:
        heads = GuardHeadsConfig(
            inner_size=self.positive_int("guard_inner_size"),
            response_risks=self.label_names("response_risk_level_map", "num_risk_level", RISKS),
            response_categories=self.label_names(
                "response_category_map", "num_category", RESPONSE_CATEGORIES
            ),
            query_risks=self.label_names("query_risk_level_map", "num_query_risk_level", RISKS),
            query_categories=self.label_names("query_category_map", "num_query_category", QUERY_CATEGORIES),
        )
        for key, risks in (
            ("response_risk_level_map", heads.response_risks),
            ("query_risk_level_map", heads.query_risks),
        ):
            if "Safe" not in risks:
                raise self.fail(
                    key, f"names {risks!r}", 'one class must be called "Safe": policies rely on it'
                )
        return heads

    def model_config(self) -> ModelConfig:
        architectures = self.raw.get("architectures")
        name = architectures[0] if isinstance(architectures, list) and architectures else None
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise self.fail(
                "architectures",
                f"is {architectures!r}",
                f"this engine runs {' (Stream) and '.join(ARCHITECTURES)} (Gen)",
            )
        self.must_be("model_type", "qwen3", "other backbones have other layers")
        self.must_be("hidden_act", "silu", "Qwen3 uses SiLU")
        self.must_be("attention_bias", False, "Qwen3 has no attention biases")
        self.must_be("use_sliding_window", False, "Qwen3Guard attends to the whole context")
        self.must_be("quantization_config", None, "use the published bfloat16 checkpoint")
        layer_types = self.raw.get("layer_types")
        if layer_types is not None and (
            not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
        ):
            raise self.fail(
                "layer_types", f"is {layer_types!r}", "only 'full_attention' layers are supported"
            )
        hidden, heads = self.positive_int("hidden_size"), self.positive_int("num_attention_heads")
        kv_heads = self.positive_int("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self.fail(
                "num_key_value_heads", f"is {kv_heads}", f"it must divide num_attention_heads={heads}"
            )
        head_dim = self.positive_int("head_dim", hidden // heads)
        if head_dim % 2:
            raise self.fail("head_dim", f"is {head_dim}", "rotary embeddings need an even number")
        tied = self.raw.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise self.fail("tie_word_embeddings", f"is {tied!r}", "it must be true or false")
        kind = ARCHITECTURES[name]
        return ModelConfig(
            kind=kind,
            hidden_size=hidden,
            num_layers=self.positive_int("num_hidden_layers", largest=1024),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=self.positive_int("intermediate_size"),
            vocab_size=self.positive_int("vocab_size"),
            rms_norm_eps=self.positive_float("rms_norm_eps", self.raw.get("rms_norm_eps", 1e-6)),
            rope_theta=self.rope_theta(),
            max_position_embeddings=self.positive_int("max_position_embeddings"),
            tie_word_embeddings=tied,
            dtype=self.dtype(),
            heads=self.heads() if kind == "stream" else None,
        )
