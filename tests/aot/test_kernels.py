"""Every kernel in use, compiled for every GPU, against what was recorded of it."""

from __future__ import annotations

import kernel_record
import pytest
from kernel_compiler import GPUS


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> kernel_record.Table:
    is_recording = request.config.getoption("--record")
    compiled = kernel_record.compile_listed(unchecked=is_recording)
    if is_recording:
        kernel_record.write(compiled)
    return compiled


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if GPUS[gpu].is_checked])
def test_kernels_are_no_worse_than_recorded(gpu: str, table: kernel_record.Table) -> None:
    problems = kernel_record.problems(gpu, table, kernel_record.load())
    assert not problems, "\n" + "\n".join(problems)


def test_the_page_shows_the_record(table: kernel_record.Table) -> None:
    assert kernel_record.PAGE.read_text() == kernel_record.render(kernel_record.recorded())
