"""What this machine has for the engine: the compiled library, memory, and cores."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from guardengine.errors import ConfigError
from guardengine.kernels import library as compiled


def load_library(path: Path | None = None) -> ctypes.CDLL:
    """Open the compiled library.

    Args:
        path: The library; by default the one beside this package.

    Returns:
        The library, with its functions' types declared.

    Raises:
        ConfigError: It is missing, is none, or was built from another version's sources (the message says in what
            they differ).
    """
    path = path or compiled.path
    mend = (
        "install a C++17 compiler, and run `pip install --no-build-isolation -e .` in the source folder, or install a "
        "wheel"
    )
    if not path.exists():
        raise ConfigError(f"{path} is missing: the C++ part of guardengine was not built; {mend}")
    try:
        return compiled.open_library(path)  # type: ignore[no-any-return]
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be used ({error}): it is of another version or machine; {mend}"
        ) from None


def memory_bytes(key: str) -> int:
    """`MemTotal` or `MemAvailable` of /proc/meminfo; where there is none, the physical memory."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def physical_cores() -> list[int]:
    """A CPU of each core that this process may use: hyperthreads of one core count once."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores: dict[str, int] = {}
    for cpu in sorted(usable):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.setdefault(siblings.read_text(), cpu)
        except OSError:
            cores[str(cpu)] = cpu
    return list(cores.values())
