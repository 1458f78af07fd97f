"""EngineConfig: what the user of the engine may choose, checked. Errors name the option, the value and the mend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import Any

from guardengine import checks
from guardengine._moved import moved_name
from guardengine.errors import ConfigError


def _option(default: Any, text: str, **about: Any) -> Any:
    """A field that says what it is.

    Args:
        default: The field's default.
        text: What it is, for the command line's help and for the page of options: metadata "help".
        about: More metadata. Of whole numbers: "least" and "largest". Of real numbers: "least" or "above", and "below".
            Of words: "choices". Of all: "unit", and "if_none", which says what None stands for.
    """
    return field(default=default, metadata={"help": text, **about})


def _count(default: int | None, text: str, largest: int, **about: Any) -> Any:
    """A field that is a whole number from 1."""
    return _option(default, text, least=1, largest=largest, **about)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits and sizes of one engine. Every field is a keyword of `Engine.from_pretrained`.

    What a field means, and which values it may have, is in its metadata; `guardengine serve --help` prints it.
    """

    kv_cache_bytes: int | None = _count(
        None,
        "memory of keys and values, in all",
        2**50,
        unit="bytes",
        if_none="4 GiB, or half of the memory that is free if that is less",
    )
    max_num_streams: int = _count(256, "streams that are open at the same time", 2**20, unit="streams")
    max_num_batched_tokens: int = _count(2048, "tokens that one step computes at most", 2**20, unit="tokens")
    max_model_len: int | None = _count(
        None, "length of a stream", 2**24, unit="tokens", if_none="the checkpoint's max_position_embeddings"
    )
    block_size: int = _count(16, "tokens of one block of the KV cache", 1024, unit="tokens")
    kv_dtype: str = _option(
        "auto",
        "type of the KV cache; auto is the model's dtype",
        choices=("auto", "float32", "bfloat16", "int8"),
    )
    kv_reserve: float = _option(
        0.02, "share of the KV cache that new streams leave to those that are open", least=0, below=1
    )
    prefix_caching: bool = _option(True, "share the KV blocks of streams that begin alike")
    max_step_ms: float | None = _option(
        None,
        "what a step should take at most",
        above=0,
        below=1e6,
        unit="milliseconds",
        if_none="only the tokens of a step are limited",
    )
    max_pending_tokens: int | None = _count(
        None,
        "tokens that are accepted and not computed, of all streams together",
        2**40,
        unit="tokens",
        if_none="no limit",
    )
    max_streams_per_tenant: int | None = _count(
        None, "open streams of one tenant (of one API key)", 2**20, unit="streams", if_none="no limit"
    )
    max_pending_tokens_per_tenant: int | None = _count(
        None,
        "tokens that are accepted and not computed, of one tenant (of one API key)",
        2**40,
        unit="tokens",
        if_none="no limit",
    )
    idle_ttl_s: float | None = _option(
        None,
        "close streams that were idle for so long",
        above=0,
        below=1e9,
        unit="seconds",
        if_none="they stay open",
    )
    num_threads: int | None = _count(
        None,
        "threads of the engine",
        1024,
        unit="threads",
        if_none="one for each core; with the reference backend torch's choice",
    )
    pin_threads: bool = _option(False, "keep the cpu backend's threads on a core each")
    audit_log: str | PathLike[str] | None = field(
        default=None,
        metadata={
            "help": "file that every decision of a Stream checkpoint is written to, as JSON lines",
            "if_none": "none is written",
        },
    )
    audit_token_ids: bool = _option(
        True, "write token ids to the audit log, which `guardengine replay` needs; without, their digest"
    )

    @staticmethod
    def from_options(options: Mapping[str, Any]) -> EngineConfig:
        """The configuration with these options and defaults for the others.

        Args:
            options: Values by the names of fields.

        Raises:
            ConfigError: A name is unknown, or a value out of range.
        """
        known = {option.name for option in fields(EngineConfig)}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise ConfigError(
                f"unknown option(s) {', '.join(unknown)}; the options are {', '.join(sorted(known))}"
            )
        config = EngineConfig(**options)
        for option in fields(EngineConfig):
            name, value, about = option.name, getattr(config, option.name), option.metadata
            if value is None and option.default is None:
                continue
            if "largest" in about:
                checks.whole_number(name, value, about["least"], about["largest"])
            elif "below" in about:
                low = about["least"] if "least" in about else about["above"]
                checks.number(name, value, low, about["below"], includes_low="least" in about)
            elif "choices" in about:
                checks.choice(name, value, about["choices"])
            elif isinstance(option.default, bool):
                if not isinstance(value, bool):
                    raise ConfigError(f"{name}={value!r}: True or False is needed")
            elif not isinstance(value, str | PathLike):
                raise ConfigError(f"{name}={value!r}: a file's path is needed, or None")
        return config


def __getattr__(name: str) -> Any:
    return moved_name(__name__, "guardengine.checkpoint.model_config", name)
