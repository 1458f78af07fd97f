"""Pictures: matplotlib, where it is installed."""

from __future__ import annotations

from typing import Any

from guardengine.errors import ConfigError


def import_pyplot() -> Any:
    """matplotlib.pyplot without a display. Raises ConfigError when matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError(f"--plot needs matplotlib ({error}); pip install guardengine[bench]") from error
    return pyplot
