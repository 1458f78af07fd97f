"""CudaAccelerator's use of torch.cuda, on objects that only note what is done with them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from guardengine.runners.accelerator import CudaAccelerator, InterpretedAccelerator

DEVICE = torch.device("cuda", 1)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Everything done to torch.cuda, in order."""
    log: list[Any] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            log.append(("stream", device))

        def synchronize(self) -> None:
            log.append("synchronize")

    class Event:
        def record(self, stream: Stream) -> None:
            log.append(("record", stream))

        def synchronize(self) -> None:
            log.append("wait")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextlib.contextmanager
    def within(what: str, **about: Any) -> Any:
        log.append((what, about))
        yield
        log.append(f"end of {what}")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "device", lambda device: within("device", device=device))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within("on stream", stream=stream))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **about: within("capture", **about))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    return log


def test_all_work_is_on_one_stream_of_its_own(log: list[Any]) -> None:
    accelerator = CudaAccelerator(DEVICE)
    log.clear()
    with accelerator.activate():
        log.append("work")
        event = accelerator.record()
    event.wait()
    stream = log[1][1]["stream"]
    assert log == [
        ("device", {"device": DEVICE}),
        ("on stream", {"stream": stream}),
        "work",
        ("record", stream),
        "end of on stream",
        "end of device",
        "wait",
    ]
    assert accelerator.name == "sm_86"


def test_capturing_runs_the_work_before_and_shares_memory(log: list[Any]) -> None:
    accelerator = CudaAccelerator(DEVICE)
    with accelerator.activate():
        stream = log[-1][1]["stream"]
        log.clear()
        graphs = [accelerator.capture(lambda: log.append("work")) for _ in range(2)]
    capture = ("capture", {"pool": "pool", "stream": stream, "capture_error_mode": "thread_local"})
    assert log[:8] == 2 * ["work", capture, "work", "end of capture"]
    log.clear()
    graphs[1].replay()
    accelerator.synchronize()
    accelerator.close()
    assert log[:2] == ["replay", "synchronize"]
    assert "empty_cache" in log


def test_joining_waits_for_the_whole_device(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    CudaAccelerator(DEVICE).join()
    assert waited == [DEVICE]


def test_copies_do_not_wait(log: list[Any]) -> None:
    copies: list[Any] = []

    class Destination:
        def copy_(self, source: Any, *, non_blocking: bool) -> None:
            copies.append((source, non_blocking))

    accelerator = CudaAccelerator(DEVICE)
    accelerator.upload("host", Destination())  # type: ignore[arg-type]
    accelerator.download("device", Destination())  # type: ignore[arg-type]
    assert copies == [("host", True), ("device", True)]


def test_host_buffers_are_pinned(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch, "empty", lambda shape, **about: asked.append((shape, about)))
    CudaAccelerator(DEVICE).host_buffer((8,), torch.int32)
    CudaAccelerator(DEVICE).empty((8,), torch.int32)
    assert asked == [
        ((8,), {"dtype": torch.int32, "pin_memory": True}),
        ((8,), {"dtype": torch.int32, "device": DEVICE}),
    ]


def test_in_the_interpreter_a_graph_is_its_work() -> None:
    accelerator, done = InterpretedAccelerator(), []
    graph = accelerator.capture(lambda: done.append(1))
    assert done == []
    graph.replay()
    graph.replay()
    assert done == [1, 1]
