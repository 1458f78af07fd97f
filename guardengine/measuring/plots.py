"""Pictures: matplotlib, where it is installed."""

from __future__ import annotations

from typing import Any

from guardengine.errors import ConfigError
from guardengine.extras import how_to_install


def import_pyplot() -> Any:
    """matplotlib.pyplot without a display. Raises ConfigError when matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError(f"pictures need matplotlib ({error}); {how_to_install('bench')}") from error
    return pyplot
