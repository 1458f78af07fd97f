"""EngineConfig: what the user of the engine may choose, checked. Errors name the option, the value and the mend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from guardengine._moved import moved_name
from guardengine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits and sizes of one engine. Every field is a keyword of `Engine.from_pretrained`."""

    kv_cache_bytes: int | None = None  # None: 4 GiB, or half of the memory that is free if that is less
    max_num_streams: int = 256  # open at the same time
    max_num_batched_tokens: int = 2048  # token budget of one step
    max_model_len: int | None = None  # tokens a stream; None: the checkpoint's max_position_embeddings
    block_size: int = 16  # tokens per KV cache block
    kv_dtype: str = "auto"  # auto: the model's dtype; or float32, bfloat16, int8
    kv_reserve: float = 0.02  # share of the KV cache that new streams leave to those that are open
    prefix_caching: bool = True  # share the KV blocks of equal beginnings
    max_step_ms: float | None = None  # what a step should take at most; None: only its tokens are limited
    max_pending_tokens: int | None = None  # accepted and not computed, of all streams together
    max_streams_per_tenant: int | None = None
    max_pending_tokens_per_tenant: int | None = None
    idle_ttl_s: float | None = None  # streams that were idle for so long are closed
    num_threads: int | None = None  # None: one for each core (the reference backend: torch's choice)
    pin_threads: bool = False  # keep the cpu backend's threads on a core each
    audit_log: str | PathLike[str] | None = (
        None  # a file that every decision goes to: guardengine.records.audit_log
    )
    audit_token_ids: bool = True  # with the ids, which `guardengine replay` needs; False: with their digest

    @staticmethod
    def from_options(options: Mapping[str, Any]) -> EngineConfig:
        """Raises ConfigError for unknown names and for values out of range."""
        known = {field.name: field.default for field in fields(EngineConfig)}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise ConfigError(
                f"unknown option(s) {', '.join(unknown)}; the options are {', '.join(sorted(known))}"
            )
        config = EngineConfig(**options)
        for name, largest in _COUNTS.items():
            value = getattr(config, name)
            if value is None and known[name] is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
                raise ConfigError(f"{name}={value!r}: a whole number from 1 to {largest} is needed")
        for name, least, limit in (("max_step_ms", 0, 1e6), ("idle_ttl_s", 0, 1e9), ("kv_reserve", None, 1)):
            value = getattr(config, name)
            if value is None and name != "kv_reserve":
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < limit or value == least:
                allowed = f"a number {'from' if least is None else 'above'} 0 and below {limit:g}"
                raise ConfigError(f"{name}={value!r}: {allowed} is needed")
        if config.kv_dtype not in ("auto", "float32", "bfloat16", "int8"):
            raise ConfigError(
                f"kv_dtype={config.kv_dtype!r}: 'auto', 'float32', 'bfloat16' or 'int8' is needed"
            )
        if config.audit_log is not None and not isinstance(config.audit_log, str | PathLike):
            raise ConfigError(f"audit_log={config.audit_log!r}: a file's path is needed, or None")
        for name in ("pin_threads", "prefix_caching", "audit_token_ids"):
            if not isinstance(getattr(config, name), bool):
                raise ConfigError(f"{name}={getattr(config, name)!r}: True or False is needed")
        return config


# EngineConfig's whole numbers, and the largest that each may be.
_COUNTS = {
    "kv_cache_bytes": 2**50,
    "max_num_streams": 2**20,
    "max_num_batched_tokens": 2**20,
    "max_model_len": 2**24,
    "block_size": 1024,
    "max_pending_tokens": 2**40,
    "max_streams_per_tenant": 2**20,
    "max_pending_tokens_per_tenant": 2**40,
    "num_threads": 1024,
}


def __getattr__(name: str) -> Any:
    return moved_name(__name__, "guardengine.checkpoint.model_config", name)
