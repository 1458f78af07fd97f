"""Old import paths: each works, is what stands at the new one, and warns once."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from guardengine import _moved

# Names of modules that are packages now.
NAMES = {
    "guardengine.engine.Engine": "guardengine.engine.engine",
    "guardengine.core.EngineCore": "guardengine.core.engine_core",
    "guardengine.checkpoint.open_checkpoint": "guardengine.checkpoint.files",
    "guardengine.records.policy_record": "guardengine.records.codec",
    "guardengine.config.ModelConfig": "guardengine.checkpoint.model_config",
}


@pytest.mark.parametrize("old", sorted(_moved.MODULES))
def test_a_module_that_moved_is_found_with_a_warning(old: str) -> None:
    if old.endswith("gpu_check"):
        pytest.importorskip("triton")
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {_moved.MODULES[old]}") as caught:
        module = importlib.import_module(old)
    now = importlib.import_module(_moved.MODULES[old])
    public = [name for name, value in vars(now).items() if getattr(value, "__module__", None) == now.__name__]
    assert public
    for name in public:
        assert getattr(module, name) is getattr(now, name)
    assert len([w for w in caught if "has moved" in str(w.message)]) == 1


@pytest.mark.parametrize("old", sorted(NAMES))
def test_a_name_of_a_module_that_is_a_package_now_is_found(old: str) -> None:
    module, _, name = old.rpartition(".")
    with pytest.warns(DeprecationWarning, match="has moved to"):
        found = getattr(importlib.import_module(module), name)
    assert found is getattr(importlib.import_module(NAMES[old]), name)


@pytest.mark.slow
def test_it_warns_once_where_it_is_imported_and_names_that_are_nowhere_stay_so() -> None:
    code = (
        "import guardengine.policy\n"
        "for _ in range(3):\n"
        "    from guardengine.scheduler import Scheduler\n"
        "import guardengine.core\n"
        "assert not hasattr(guardengine.core, 'nonsense')\n"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stderr.count("has moved to guardengine.core.scheduler") == 1
    assert "<string>:3: DeprecationWarning" in run.stderr
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("guardengine.nonsense")


def test_a_program_that_moved_still_runs() -> None:
    command = [sys.executable, "-P", "-m", "guardengine.bench.gpu_check", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "usage:" in run.stdout
