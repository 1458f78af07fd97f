"""stats_of(): what `Engine.stats` reports of a core."""

from __future__ import annotations

from typing import Any

from guardengine._version import __version__
from guardengine.core.engine_core import EngineCore


def stats_of(core: EngineCore) -> dict[str, Any]:
    """Counters since the start and gauges of now, as a plain dict."""
    runner, about = core.runner, core.runner.info
    pool, cache = core.pool, core.pool.cache
    return {
        **core.counters,
        "failures": dict(core.failures),
        "preemptions": core.residency.num_preempted,
        "streams_open": len(core.states),
        "streams_idle": len(core.residency.idle),
        "tokens_pending": core.admission.total.num_pending_tokens,
        "prefix_tokens_queried": cache.num_queried_tokens if cache else 0,
        "prefix_tokens_hit": cache.num_hit_tokens if cache else 0,
        "kv_blocks_total": pool.num_blocks,
        "kv_blocks_free": pool.num_free,
        "kv_blocks_cached": pool.num_cached,
        "kv_blocks_evicted": pool.num_evicted,
        "kv_cache_bytes": runner.kv_cache.num_bytes,
        "block_size": pool.block_size,
        "max_model_len": core.max_model_len,
        "max_num_streams": core.options.max_num_streams,
        "backend": about.backend,
        "device": str(about.device),
        "isa": about.isa,
        "dtype": str(about.dtype).removeprefix("torch."),
        "quantization": about.quantization,
        "kv_dtype": str(runner.kv_cache.dtype).removeprefix("torch."),
        "num_threads": about.num_threads,
        "version": __version__,
    }
