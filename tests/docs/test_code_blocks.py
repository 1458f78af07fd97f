"""The code that the pages show: what can run is run, what cannot says why, and every command's options exist."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, ROOT, block, blocks, printed_by

from guardengine import Engine

GUIDES = ROOT / "docs" / "guides"
MARKS = r"run|not run: \w.{10,}|examples/\w+\.py"


def runnable(page: Path) -> list[str]:
    return [each.body for each in blocks(page) if each.mark == "run"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_is_run_or_says_why_not(page: Path) -> None:
    for each in blocks(page):
        if each.language == "python":
            assert re.fullmatch(MARKS, each.mark), each.body


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_one_after_the_other(
    page: Path,
    checkpoints: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"path": str(checkpoints()), "__name__": "page"}
    expected = []
    with asyncio.Runner() as runner:
        for body in runnable(page):
            code = compile(body, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            if code.co_flags & inspect.CO_COROUTINE:
                runner.run(eval(code, names))
            else:
                exec(code, names)
            expected += re.findall(r"^ *print\(.*\)  # ([\d ]+)$", body, re.MULTILINE)
    if isinstance(names.get("engine"), Engine):
        names["engine"].close()
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in expected if line not in printed] == []


@pytest.mark.slow
def test_the_gen_example_is_the_file_and_runs(checkpoints: Callable[..., Path]) -> None:
    printed = printed_by(GUIDES / "gen.md", "gen.py", checkpoints("gen-tiny"))
    recorded = block(GUIDES / "gen.md", "gen output").splitlines()
    assert len(printed) == len(recorded) == 6
    for output in (printed, recorded):
        for answer, odds, verdict in (output[:3], output[3:]):
            assert re.match(r"'Safety: \w+\\nCategories: ", answer)
            assert odds.startswith("{'Safe': 0.")
            assert verdict.startswith("Verdict(action=")


@pytest.mark.slow
def test_the_loop_is_the_file_and_runs(checkpoints: Callable[..., Path]) -> None:
    page = GUIDES / "guarded-loops.md"
    printed = printed_by(page, "guarded_loop.py", checkpoints())
    for lines in (printed, block(page, "guarded output").splitlines()):
        assert sum(line.startswith("Verdict(") for line in lines) == 2
        assert all(re.match(r"['\"]|   \[|Verdict\(action=", line) for line in lines)
