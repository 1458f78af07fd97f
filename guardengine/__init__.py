"""guardengine: the runtime for streaming safety moderation with Qwen3Guard.

Names are loaded on first use, so importing the package (or only its policy and errors) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from guardengine._moved import install_finder
from guardengine._version import __version__

if TYPE_CHECKING:
    from guardengine.checkpoint.model_config import ModelConfig
    from guardengine.compat import AutoGuard
    from guardengine.config import EngineConfig
    from guardengine.engine.async_engine import AsyncEngine
    from guardengine.engine.async_stream import AsyncStream
    from guardengine.engine.engine import Engine
    from guardengine.engine.memory import collect_rarely
    from guardengine.engine.stream import Stream
    from guardengine.errors import (
        AuditError,
        Blocked,
        CheckpointError,
        ConfigError,
        GuardEngineError,
        IntegrityError,
        InvalidInput,
        InvalidText,
        InvalidTokens,
        OutputError,
        Overloaded,
        ServerError,
        StreamClosed,
        StreamTooLong,
        WrongLoop,
        WrongThread,
    )
    from guardengine.guarding.guarded import guarded, guarded_sync
    from guardengine.guarding.intervention import intervene
    from guardengine.labels import GenModeration, Label, Moderation, Verdict
    from guardengine.policy import Policy
    from guardengine.text.spans import Span

_HOME = {
    "AsyncEngine": "engine.async_engine",
    "AsyncStream": "engine.async_stream",
    "AuditError": "errors",
    "AutoGuard": "compat",
    "Blocked": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "Engine": "engine.engine",
    "EngineConfig": "config",
    "GenModeration": "labels",
    "GuardEngineError": "errors",
    "IntegrityError": "errors",
    "InvalidInput": "errors",
    "InvalidText": "errors",
    "InvalidTokens": "errors",
    "Label": "labels",
    "ModelConfig": "checkpoint.model_config",
    "Moderation": "labels",
    "OutputError": "errors",
    "Overloaded": "errors",
    "Policy": "policy",
    "ServerError": "errors",
    "Span": "text.spans",
    "Stream": "engine.stream",
    "StreamClosed": "errors",
    "StreamTooLong": "errors",
    "Verdict": "labels",
    "WrongLoop": "errors",
    "WrongThread": "errors",
    "collect_rarely": "engine.memory",
    "guarded": "guarding.guarded",
    "guarded_sync": "guarding.guarded",
    "intervene": "guarding.intervention",
}

__all__ = [
    "AsyncEngine",
    "AsyncStream",
    "AuditError",
    "AutoGuard",
    "Blocked",
    "CheckpointError",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "GenModeration",
    "GuardEngineError",
    "IntegrityError",
    "InvalidInput",
    "InvalidText",
    "InvalidTokens",
    "Label",
    "ModelConfig",
    "Moderation",
    "OutputError",
    "Overloaded",
    "Policy",
    "ServerError",
    "Span",
    "Stream",
    "StreamClosed",
    "StreamTooLong",
    "Verdict",
    "WrongLoop",
    "WrongThread",
    "__version__",
    "collect_rarely",
    "guarded",
    "guarded_sync",
    "intervene",
]


install_finder()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError:
        from guardengine.extras import check_installed

        check_installed(f"guardengine.{name}", "engine")  # says what is missing, and the mend
        raise


def __dir__() -> list[str]:
    return __all__
