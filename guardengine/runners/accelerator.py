"""Accelerator: the few things that a runner asks of a device besides operators. Knows no model and no batch.

Everything is done in order on one queue: copies, operators, replays. `CudaAccelerator` is an NVIDIA GPU;
`InterpretedAccelerator` runs the same kernels in Triton's interpreter on the CPU, thousands of times slower, for
looking at them where there is no GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from guardengine.errors import ConfigError

MIN_CAPABILITY = (8, 0)  # bfloat16 on tensor cores, cp.async
INTERPRET = "TRITON_INTERPRET"
# Of the device's memory: cuBLAS' workspace, the kernels, the captured graphs, what the allocator rounds up.
CUDA_OVERHEAD_BYTES = 512 * 2**20


class Event(Protocol):
    """A place in the queue."""

    def wait(self) -> None:
        """Return once all work before it is done. Raises what went wrong on the device."""


class Graph(Protocol):
    """Work that was captured once and can be queued again as a whole."""

    def replay(self) -> None: ...


class Accelerator(Protocol):
    """A device with one queue of work."""

    device: torch.device
    can_time: bool  # kernels can be timed, and what is fastest be chosen

    @property
    def name(self) -> str:
        """What is printed as the instruction set: "sm_90"."""

    @property
    def num_cores(self) -> int:
        """Multiprocessors: how many programs it takes to keep all of the device busy."""

    def activate(self) -> contextlib.AbstractContextManager[None]:
        """Within, operators run on this device's queue."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the device."""

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the host that copies to and from the device can use directly."""

    def upload(self, source: Tensor, destination: Tensor) -> None:
        """Queue a copy from a host buffer to the device."""

    def download(self, source: Tensor, destination: Tensor) -> None:
        """Queue a copy from the device to a host buffer."""

    def record(self) -> Event:
        """Mark this place in the queue."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Run `work` once, to compile and load what it needs, then capture what it queues."""

    def join(self) -> None:
        """Wait for work that others queued on the device, such as the copies of weights."""

    def synchronize(self) -> None:
        """Wait for all queued work. Raises what went wrong on the device."""

    def close(self) -> None:
        """Give unused memory back."""


class CudaAccelerator:
    """One NVIDIA GPU, with a stream of its own: work of others in this process does not get in between."""

    can_time = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)
        self._pool: Any = None  # of memory, shared by graphs: they never run at the same time

    @property
    def name(self) -> str:
        return "sm_{}{}".format(*torch.cuda.get_device_capability(self.device))

    @property
    def num_cores(self) -> int:
        return torch.cuda.get_device_properties(self.device).multi_processor_count

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def upload(self, source: Tensor, destination: Tensor) -> None:
        destination.copy_(source, non_blocking=True)

    def download(self, source: Tensor, destination: Tensor) -> None:
        destination.copy_(source, non_blocking=True)

    def record(self) -> Event:
        event = torch.cuda.Event()
        event.record(self._stream)
        return _CudaEvent(event)

    def capture(self, work: Callable[[], None]) -> Graph:
        work()
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Other threads may use the GPU meanwhile: "thread_local" lets them.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph

    def join(self) -> None:
        torch.cuda.synchronize(self.device)  # torch's streams do not wait for the default one

    def synchronize(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        self._pool = None
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


class InterpretedAccelerator:
    """The CPU, with Triton's interpreter: what is queued has run at once, a graph is the function it was made of."""

    device = torch.device("cpu")
    name = "interpreter"
    num_cores = 1
    can_time = False

    def activate(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def upload(self, source: Tensor, destination: Tensor) -> None:
        destination.copy_(source)

    def download(self, source: Tensor, destination: Tensor) -> None:
        destination.copy_(source)

    def record(self) -> Event:
        return _Done()

    def capture(self, work: Callable[[], None]) -> Graph:
        return _Again(work)

    def join(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Done:
    def wait(self) -> None:
        pass


class _Again:
    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def replay(self) -> None:
        self._work()


def default_device() -> torch.device:
    """The first GPU where the kernels run on it, otherwise the CPU."""
    usable = (
        torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability(0) >= MIN_CAPABILITY
        and not is_interpreted()
    )
    return torch.device("cuda", 0) if usable else torch.device("cpu")


def parse_device(device: str) -> torch.device:
    """The device of that name: "cpu", "cuda", "cuda:1". Raises ConfigError where it is not there."""
    if device == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", device) if isinstance(device, str) else None
    if match is None:
        raise ConfigError(f"device={device!r}: choose 'auto', 'cpu', 'cuda' or 'cuda:<index>'")
    check_cuda(device)
    index, count = int(match[1] or 0), torch.cuda.device_count()
    if index >= count:
        raise ConfigError(
            f"device={device!r}: there are {count} GPU(s), the last is cuda:{count - 1} (CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})"
        )
    return torch.device("cuda", index)


def check_cuda(device: str) -> None:
    """Raise ConfigError, saying why, where torch cannot use any NVIDIA GPU."""
    if torch.version.hip is not None:
        raise ConfigError(
            f"device={device!r}: this torch is built for AMD GPUs; the kernels are for NVIDIA's"
        )
    if torch.version.cuda is None:
        raise ConfigError(
            f"device={device!r}: torch {torch.__version__} is a build without CUDA; install one with it "
            "(pip install torch==2.13.* from PyPI), or use device='cpu'"
        )
    if torch.cuda.is_available():
        return
    try:
        torch.cuda.init()
        reason = "no GPU is visible"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
    raise ConfigError(
        f"device={device!r}: torch, built for CUDA {torch.version.cuda}, cannot use a GPU: {reason}. Check that "
        "nvidia-smi lists the GPU and that its driver is new enough for that CUDA; in a container, that the GPU was "
        "passed in"
    )


def check_capability(device: torch.device) -> None:
    """Raise ConfigError for a GPU that lacks what the kernels use."""
    found = torch.cuda.get_device_capability(device)
    if found < MIN_CAPABILITY:
        raise ConfigError(
            f"device='{device}': {torch.cuda.get_device_name(device)} has compute capability "
            f"{found[0]}.{found[1]}; the triton backend needs {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} (A100, RTX 30 "
            "or later). Use backend='reference', or device='cpu'"
        )


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that is free now."""
    free, _ = torch.cuda.mem_get_info(device)
    return free


def check_triton() -> None:
    """Raise ConfigError where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "backend='triton': Triton is not installed; torch's CUDA builds bring it, beside a CPU build "
            "`pip install triton==3.7.1`"
        )


def is_interpreted() -> bool:
    """Whether Triton's interpreter was asked for. It must be before Triton is first imported."""
    return os.environ.get(INTERPRET, "").lower() in ("1", "true", "on", "yes", "y")


def choose_accelerator(device: torch.device) -> Accelerator:
    """What the triton backend runs on. Raises ConfigError."""
    if device.type == "cuda":
        if is_interpreted():
            raise ConfigError(
                f"{INTERPRET} is set: unset it to run on device='{device}', or pass device='cpu'"
            )
        check_capability(device)
        return CudaAccelerator(device)
    if not is_interpreted():
        raise ConfigError(
            "backend='triton' needs a GPU: pass device='cuda', or use backend='cpu'. To look at what the kernels "
            f"compute without one, thousands of times slower, set {INTERPRET}=1 before Python starts"
        )
    return InterpretedAccelerator()
