"""Where modules were before the tree became packages: each old import path still works, and says where to go.

Kept for one minor release. A module that moved is found by a finder at the end of `sys.meta_path`, so that it costs
nothing while nobody asks; a name of a module that is now a package is found by that package's `__getattr__`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

# Package -> its modules that lay elsewhere: `old` where the name stayed, `old:new` where it did not.
_PACKAGES = {
    "text": "byte_level:tokenizer chat:chat_template chat_template:special_tokens foreign_ids retokenizer "
    "text_books:spans thinking tokenizer unicode_rules vocabulary",
    "checkpoint": "fingerprint hub make_checkpoint:random_weights outliers weights",
    "runners": "accelerator batch captured_steps cpu_runner gpu_limits gpu_runner lm_head model runner "
    "step_inputs tuned",
    "core": "admission block_pool conversation:feeds deadlines gate health idle_streams:residency isolation pipeline "
    "prefix_cache readout residency scheduler state step_times:pipeline text_stream:text_feeding token_ids "
    "whole_streams",
    "records": "audit:audit_log audit_reader snapshot",
    "engine": "async_engine async_stream calls engine_thread garbage:memory loading stream",
    "guarding": "deltas guarded_reply:guarded intervention pull_ahead shown:held",
    "annotate": "annotate.judging:annotations annotate.assembly:jsonl_out annotate.folders:data_files",
    "verify": "quantization_error:error replay verify_corpus:corpus verify_quantization:quantization "
    "verify_report:report",
    "measuring": "machine",
    "bench.gpu": "bench.gpu_check:check",
    "server": "server.run:uvicorn_server server.statuses:refusals server.wire:json_values "
    "server.routes.taxonomy:taxonomy",
    "cli": "on_ray.command:ray_serve",
}
MODULES = {
    f"guardengine.{old}": f"guardengine.{package}.{new or old}"
    for package, names in _PACKAGES.items()
    for old, _, new in (item.partition(":") for item in names.split())
}


def moved_name(package: str, module: str, name: str) -> Any:
    """`name` of the module that `package` was, from `module`, where it stands now.

    Raises:
        AttributeError: there is no such name.
    """
    if name.startswith("__"):
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(module), name, None)
    if found is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    _warn(f"{package}.{name}", f"{module}.{name}", stacklevel=4)
    return found


def install_finder() -> None:
    """Let the import system find the old paths."""
    sys.meta_path.append(_Finder)


class _Finder:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in MODULES:
            return None
        return ModuleSpec(name, _Loader())  # type: ignore[arg-type]  # has what the import system calls


class _Loader:
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        _warn(name, MODULES[name], stacklevel=3)  # the import system's own frames do not count
        now = importlib.import_module(MODULES[name])
        module.__doc__ = now.__doc__
        module.__dict__["__getattr__"] = lambda attribute: getattr(now, attribute)
        module.__dict__["__dir__"] = lambda: dir(now)
        if hasattr(now, "__all__"):
            module.__dict__["__all__"] = now.__all__

    def get_code(self, name: str) -> CodeType:
        """For `python -m`."""
        run = f"import runpy; runpy.run_module({MODULES[name]!r}, run_name='__main__', alter_sys=True)"
        return compile(run, name, "exec")


def _warn(old: str, new: str, stacklevel: int) -> None:
    warnings.warn(f"{old} has moved to {new}; import it from there", DeprecationWarning, stacklevel)
