"""Every kernel in use, compiled for every GPU, against what was recorded of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import kernel_record
import pytest
from kernel_compiler import GPUS

SAMPLE = "sm_90"


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> kernel_record.Table:
    """What kernels compile to. Of sources that have not changed since they were recorded, one GPU's are compiled: that
    compiling is still what it was; the others' could only be what is recorded."""
    if request.config.getoption("--record"):
        compiled = kernel_record.compile_listed(list(GPUS))
        kernel_record.write(compiled)
        return compiled
    if kernel_record.is_of_these_sources():
        return kernel_record.recorded() | kernel_record.compile_listed([SAMPLE])
    return kernel_record.compile_listed([gpu for gpu in GPUS if GPUS[gpu].is_checked])


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS if GPUS[gpu].is_checked])
def test_kernels_are_no_worse_than_recorded(gpu: str, table: kernel_record.Table) -> None:
    problems = kernel_record.problems(gpu, table, kernel_record.load())
    assert not problems, "\n" + "\n".join(problems)


def test_the_page_shows_the_record(table: kernel_record.Table) -> None:
    assert kernel_record.PAGE.read_text() == kernel_record.render(kernel_record.recorded())


def test_a_change_of_any_source_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("kernels", "tests"):
        shutil.copytree(kernel_record.ROOT / folder, tmp_path / folder)
    before = kernel_record.sources()
    monkeypatch.setattr(kernel_record, "ROOT", tmp_path)
    assert kernel_record.sources() == before
    with (tmp_path / "kernels" / "gpu" / "rows.py").open("a") as file:
        file.write("\n# A comment compiles to nothing.\n")
    assert kernel_record.sources() == before
    with (tmp_path / "kernels" / "gpu" / "rows.py").open("a") as file:
        file.write("_ONE = 1\n")
    assert kernel_record.sources() != before
    assert not kernel_record.is_of_these_sources()
