"""EngineInfo: what an engine is, for those who need no more of its inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from guardengine.checkpoint.model_config import GuardHeadsConfig
from guardengine.core.engine_core import EngineCore
from guardengine.labels import Role


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What does not change while an engine is open.

    Attributes:
        kind: "stream" or "gen", of the checkpoint.
        max_model_len: Most tokens of a stream.
        vocab_size: Number of token ids.
        reads_text: Whether messages and text can be given: the checkpoint has a tokenizer.json.
        risks: Names of the response's risks, in the order of config.json; () for a Gen checkpoint.
        categories: Names of each role's categories, in the order of config.json; {} for a Gen checkpoint.
    """

    kind: Literal["stream", "gen"]
    max_model_len: int
    vocab_size: int
    reads_text: bool
    risks: tuple[str, ...]
    categories: Mapping[Role, tuple[str, ...]]


def info_of(core: EngineCore, heads: GuardHeadsConfig | None, *, reads_text: bool) -> EngineInfo:
    """Of a core, and of the heads of a Stream checkpoint."""
    common = core.max_model_len, core.vocab_size, reads_text
    if heads is None:
        return EngineInfo("gen", *common, (), {})
    categories: dict[Role, tuple[str, ...]] = {
        "user": tuple(heads.query_categories),
        "assistant": tuple(heads.response_categories),
    }
    return EngineInfo("stream", *common, tuple(heads.response_risks), categories)
