"""The `guardengine` command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from guardengine import Engine, __version__
from guardengine.checkpoint.random_weights import PRESETS
from guardengine.cli import main


def test_make_checkpoint_writes_what_the_engine_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "guard"
    assert main(["make-checkpoint", "--preset", "stream-tiny", str(folder)]) == 0
    assert str(folder) in capsys.readouterr().out
    with Engine.from_pretrained(folder, kv_cache_bytes=2**20) as engine:
        assert engine.moderate([{"role": "user", "content": "Hello"}]).prompt is not None


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("mine")
    assert main(["make-checkpoint", "--preset", "stream-tiny", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["make-checkpoint", "--preset", "x", "d"], ["--nonsense"]]
)
def test_bad_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_every_released_size_is_a_preset() -> None:
    assert {"stream-0.6b", "stream-4b", "stream-8b", "stream-tiny", "gen-0.6b", "gen-tiny"} <= set(PRESETS)


@pytest.mark.slow
def test_installed_as_a_console_script_and_as_a_module() -> None:
    script = Path(sys.executable).parent / "guardengine"
    for command in ([str(script)], [sys.executable, "-P", "-m", "guardengine"]):
        run = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert run.stdout.split() == ["guardengine", __version__]
