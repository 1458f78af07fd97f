"""The machine and its ceilings, with which measurements are compared. Knows no model and no tensors.

`probe_ceilings` measures with the compiled library. `machine_stamp` describes the machine in the record of a
benchmark.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from guardengine import checks
from guardengine._version import __version__
from guardengine.errors import ConfigError
from guardengine.kernels.abi import Peak, Status
from guardengine.runners.cores import load_library, memory_bytes

_PROBLEMS = {
    Status.BAD_ARGUMENT: "an argument is out of range",
    Status.NO_MEMORY: "there is not enough memory for the read buffer: free some",
    Status.NO_THREADS: "the threads cannot be started: use fewer, or raise the limit (ulimit -u)",
}
_MAX_THREADS = 1024
_MIN_READ_BYTES = 512 * 2**20
_READ_REPEATS = 5
_PEAK_S = 0.05


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The most that `num_threads` threads of this machine can do in a second, at the time of the probe.

    A peak is 0.0 where the CPU lacks the instructions: AVX512-BF16 dot products for bf16, VNNI or AVX2 for int8. A
    multiplication and an addition are two operations. Matrix units (AMX) are not probed. Reading is from memory; on
    shared machines the passes of a probe, and probes, can differ a lot.

    Attributes:
        num_threads: Threads of the probe.
        read_bytes_per_s: Bytes read in a second, in the fastest pass.
        read_bytes_per_s_median: Bytes read in a second, in the median pass.
        read_buffer_bytes: Size of the buffer that was read.
        fp32_flops: Operations in float32 in a second.
        bf16_flops: Operations in bfloat16 in a second.
        int8_ops: Operations in int8 in a second.
        isa: The instruction set that the library uses.
    """

    num_threads: int
    read_bytes_per_s: float
    read_bytes_per_s_median: float
    read_buffer_bytes: int
    fp32_flops: float
    bf16_flops: float
    int8_ops: float
    isa: str


def probe_ceilings(num_threads: int, *, read_buffer_bytes: int | None = None) -> Ceilings:
    """Measure read bandwidth and arithmetic peaks, in about a second.

    Args:
        num_threads: 1 to 1024; use no more than there are cores.
        read_buffer_bytes: Size of the buffer that is read. None: 512 MiB or twice the last-level cache, whichever is
            more, and at most a quarter of the available memory, so that a pass leaves nothing in the cache for the
            next. A virtual machine that touches this memory for the first time may need some seconds more.

    Raises:
        ConfigError: The library is not built, a value is out of range, or the machine cannot do it.
    """
    checks.whole_number("num_threads", num_threads, 1, _MAX_THREADS)
    smallest = 4096 * num_threads
    if read_buffer_bytes is None:
        read_buffer_bytes = max(_MIN_READ_BYTES, 2 * last_level_cache_bytes())
        read_buffer_bytes = max(smallest, min(read_buffer_bytes, memory_bytes("MemAvailable") // 4))
    if read_buffer_bytes < smallest:
        raise ConfigError(
            f"read_buffer_bytes={read_buffer_bytes}: {num_threads} threads need {smallest} at least; "
            "for memory bandwidth use several times the last-level cache"
        )
    library = load_library()
    best, median = ctypes.c_double(), ctypes.c_double()
    _check(library.ge_probe_read(num_threads, read_buffer_bytes, _READ_REPEATS, best, median))
    peaks = []
    for kind in Peak:
        peak = ctypes.c_double()
        _check(library.ge_probe_peak(kind, num_threads, _PEAK_S, peak))
        peaks.append(peak.value)
    return Ceilings(
        num_threads=num_threads,
        read_bytes_per_s=best.value,
        read_bytes_per_s_median=median.value,
        read_buffer_bytes=read_buffer_bytes,
        fp32_flops=peaks[0],
        bf16_flops=peaks[1],
        int8_ops=peaks[2],
        isa=library.ge_isa().decode(),
    )


def machine_stamp() -> dict[str, Any]:
    """The description of machine and software in a record. Unknown values are None."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory_bytes("MemTotal"),
        "last_level_cache_bytes": last_level_cache_bytes() or None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "guardengine": __version__,
        **_git_state(Path(__file__).resolve().parents[2]),
    }


def last_level_cache_bytes() -> int:
    """The size of the largest cache of the first core; 0 where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.endswith("K") and text[:-1].isdecimal():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes)


def _check(status: int) -> None:
    if status:
        raise ConfigError(f"the probe failed: {_PROBLEMS.get(status, f'status {status}')}")


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, Any]:
    """The commit of the checkout from which guardengine runs, and whether it has changes; None for an installed
    package, even when it is installed inside another repository."""
    unknown = {"commit": None, "is_dirty": None}
    top = _git(folder, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != folder:
        return unknown
    commit = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD")
    return {"commit": commit, "is_dirty": bool(_git(folder, "status", "--porcelain"))} if commit else unknown


def _git(folder: Path, *arguments: str) -> str | None:
    # Without optional locks, so that this does not disturb another git command that runs at the same time.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
