"""The compiled library: where it is, and the one place that opens it. Knows no tensors."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

from . import abi

# Tests assign another build of the same sources before anything native is used.
path = Path(sys.modules[__name__.partition(".")[0]].__path__[0]) / "_C.so"


@cache
def open_library(path: Path) -> ctypes.CDLL:
    """Open a compiled library, once a process.

    Args:
        path: The shared library.

    Returns:
        The library, with its functions' types declared.

    Raises:
        OSError: It cannot be loaded, or was compiled from other sources than this Python code belongs to.
    """
    library = ctypes.CDLL(str(path))
    abi.declare(library)
    return library
