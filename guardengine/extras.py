"""What pyproject.toml's extras bring, and what an error says where a part of it is not installed."""

from __future__ import annotations

import importlib.util

from guardengine.errors import ConfigError

_ENGINE = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "huggingface_hub", "tqdm")
_SERVER = (*_ENGINE, "fastapi", "uvicorn", "httptools", "websockets", "prometheus_client")

# The modules that each extra brings, by their import names.
EXTRAS = {
    "bench": (*_ENGINE, "transformers", "matplotlib"),
    "client": ("httpx", "httpx_sse", "websockets"),
    "data": (*_ENGINE, "pyarrow"),
    "engine": _ENGINE,
    "evaluate": (*_ENGINE, "matplotlib", "pyarrow"),
    "proxy": (*_SERVER, "httpx"),
    "ray": (*_SERVER, "pyarrow", "ray"),
    "server": _SERVER,
}


def how_to_install(extra: str) -> str:
    """The mend, for an error: guardengine is on no package index, so it is installed from its source or its wheel."""
    return (
        f"install the extra `{extra}`: pip install '.[{extra}]' in guardengine's source folder, or its wheel, with "
        f"[{extra}] behind the file's name"
    )


def check_installed(who: str, extra: str) -> None:
    """Check that an extra is installed. Imports nothing.

    Args:
        who: What needs it, for the error.
        extra: A key of EXTRAS.

    Raises:
        ConfigError: Modules of the extra are missing.
    """
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{who} needs {', '.join(missing)}, not installed here; {how_to_install(extra)}")
