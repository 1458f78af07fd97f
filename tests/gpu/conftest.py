"""Triton kernels without a GPU: this folder runs in Triton's interpreter, patched, in a process of its own.

TRITON_INTERPRET=1 python -P -m pytest tests/gpu        (make test-gpu-interpreted)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read when functions are decorated, Triton's own among them


def install() -> None:
    """Before any test module is imported. Fails where triton came first, or is not the version that is known."""
    try:
        import triton_interpreter
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error
    triton_interpreter.install()


install()


@pytest.fixture(params=["ascending", "descending", 1])
def any_program_order(request: pytest.FixtureRequest) -> Iterator[str | int]:
    """Runs the test with programs in several orders: a GPU promises none, and another program comes last in each."""
    import triton_interpreter

    with triton_interpreter.program_order(request.param):
        yield request.param
