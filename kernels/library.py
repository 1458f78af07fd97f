"""The compiled library: where it is, and the one place that opens it. Knows no tensors and no function in it."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

# Tests assign another build of the same sources before anything native is used.
path = Path(sys.modules[__name__.partition(".")[0]].__path__[0]) / "_C.so"


@cache
def open_library(path: Path) -> ctypes.CDLL:
    """The library at `path`, once a process: whoever declares its functions' types shares them. Raises OSError."""
    return ctypes.CDLL(str(path))
