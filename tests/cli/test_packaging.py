"""What each extra brings, and what is said where one is missing. A client needs neither torch nor a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from serving import served

from guardengine.extras import EXTRAS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCE = ("csrc", "guardengine", "kernels", "pyproject.toml", "setup.py", "README.md", "LICENSE")
ENGINE_COMMANDS = {
    "make-checkpoint": ["DIR", "--preset", "stream-tiny"],
    "verify-quantization": ["CHECKPOINT"],
    "replay": ["LOG", "--checkpoint", "CHECKPOINT"],
    "evaluate": ["FILE", "--checkpoint", "CHECKPOINT"],
    "annotate": ["IN", "OUT", "--checkpoint", "CHECKPOINT"],
    "serve": ["CHECKPOINT"],
    "proxy": ["CHECKPOINT", "--upstream", "http://127.0.0.1:1"],
    "ray-serve": ["CHECKPOINT"],
    "moderate": ["--checkpoint", "CHECKPOINT", "Hello"],
    "chat": ["--checkpoint", "CHECKPOINT", "--upstream", "http://127.0.0.1:1", "--model", "NAME"],
}
OWN_EXTRAS = {"serve": "server", "proxy": "proxy", "ray-serve": "ray"}


def modules(extra: str) -> set[str]:
    """The modules that pyproject.toml's extra brings."""
    found = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        name, extras = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement).groups()
        if name == "guardengine":
            found |= {module for other in extras.split(",") for module in modules(other)}
        else:
            found.add(name.replace("-", "_"))
    return found


def without_torch(code: str) -> str:
    return f"import sys; sys.modules['torch'] = None; {code}"


@pytest.mark.parametrize("extra", EXTRAS)
def test_errors_know_what_an_extra_brings(extra: str) -> None:
    assert set(EXTRAS[extra]) == modules(extra)


def test_without_extras_nothing_is_needed_and_only_the_client_has_no_engine() -> None:
    assert PROJECT["dependencies"] == []
    for extra in PROJECT["optional-dependencies"]:
        assert ("torch" in modules(extra)) == (extra not in ("client", "browser", "docs")), extra


@pytest.mark.parametrize("command", ENGINE_COMMANDS)
def test_a_command_names_the_extra_that_it_lacks(command: str) -> None:
    arguments = [command, *ENGINE_COMMANDS[command]]
    code = without_torch(f"from guardengine.cli import main; sys.exit(main({arguments!r}))")
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2, run.stderr
    extra = OWN_EXTRAS.get(command, "engine")
    assert f"guardengine {command}" in run.stderr
    assert "needs torch, not installed here" in run.stderr
    assert f"install the extra `{extra}`: pip install '.[{extra}]'" in run.stderr


def test_so_does_a_name_of_the_package() -> None:
    code = without_torch(
        "from guardengine import Policy, GuardEngineError, Label; from guardengine import Engine"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert "ConfigError: guardengine.Engine needs torch, not installed here; install the extra" in run.stderr


@pytest.mark.slow
@pytest.mark.servers
def test_a_client_installs_without_torch_and_without_a_compiler(checkpoints, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    folder = tmp_path / "venv" / "bin"
    environment = {**os.environ, "PATH": str(folder), "CXX": "no-compiler"}

    def run(*command: str, statuses: tuple[int, ...] = (0,)) -> str:
        done = subprocess.run(
            [str(folder / command[0]), *command[1:]],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in statuses, done.stdout + done.stderr
        return done.stdout

    run("python", "-m", "pip", "install", "--quiet", f"{source}[client]")
    installed = {line.split("==")[0] for line in run("python", "-m", "pip", "freeze").split()}
    assert not installed & {"torch", "numpy", "tokenizers", "fastapi", "transformers"}
    assert {"httpx", "websockets"} <= installed
    with served(checkpoints(dtype="float32")) as server:
        url = server.url
        # 1: flagged, as the weights are random.
        command = ("guardengine", "moderate", "--url", url, "--json", "--prompt", "Hello", "Hi there")
        out = run(*command, statuses=(0, 1))
        assert '"type": "verdict"' in out
        code = (
            "import sys; from guardengine.client import GuardClient\n"
            f"with GuardClient({url!r}) as client: print(client.moderations('Hello')[0]['flagged'])"
        )
        assert run("python", "-c", code).strip() in ("True", "False")
