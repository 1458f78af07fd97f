"""What the server needs beside guardengine itself."""

from __future__ import annotations

import importlib.util

from guardengine.errors import ConfigError

_NEEDED = ("fastapi", "uvicorn", "httptools", "websockets", "prometheus_client")


def check_installed() -> None:
    """Raise ConfigError where a package of the extra is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the server needs {', '.join(missing)}, not installed here; run pip install 'guardengine[server]'"
        )
