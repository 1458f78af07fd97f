"""What an operator launches: Triton kernels, and torch operators that would each be a kernel too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

# These compute nothing: they make tensors without values, or other views.
FREE = {
    f"aten::{name}"
    for name in (
        *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
        *("view", "_unsafe_view", "_reshape_alias", "as_strided", "slice", "select", "split", "t"),
        *("unsqueeze", "squeeze", "detach", "alias"),
    )
}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.computed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name not in FREE:
            self.computed.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def counted(operator: Callable[[], object]) -> tuple[int, list[str]]:
    """Launches of Triton kernels, and names of torch operators that compute, in one call."""
    launches = 0
    original = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal launches
        launches += 1
        with torch._C._DisableTorchDispatch():  # what the interpreter does itself is not the operator's
            return original(self, *args, **kwargs)

    recorder = _Recorder()
    with mock.patch.object(interpreter.GridExecutor, "__call__", launch), recorder:
        operator()
    return launches, recorder.computed
