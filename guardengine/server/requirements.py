"""The packages that the server needs beside guardengine itself."""

from __future__ import annotations

import importlib.util

from guardengine.errors import ConfigError

_SERVER = ("fastapi", "uvicorn", "httptools", "websockets", "prometheus_client")
_PACKAGES: dict[str, tuple[str, ...]] = {"server": _SERVER, "proxy": (*_SERVER, "httpx")}


def check_installed(extra: str = "server") -> None:
    """Raise ConfigError when a package of the extra is missing."""
    missing = [name for name in _PACKAGES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the {extra} needs {', '.join(missing)}, not installed here; run pip install 'guardengine[{extra}]'"
        )
