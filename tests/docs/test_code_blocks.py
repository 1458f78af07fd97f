"""The code that the pages show: what can run is run, what cannot says why, and every command's options exist."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, ROOT, block, blocks, printed_by

from guardengine import Engine
from guardengine.cli import build_parser

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


def commands() -> Iterator[tuple[Path, list[str]]]:
    """The `guardengine` command lines in the fenced blocks: (page, arguments)."""
    for page in PAGES:
        for each in blocks(page):
            for line in re.sub(r"\\\n", " ", each.body).splitlines():
                for part in re.findall(r"(?:^|[|] *|[$] )guardengine (.+?)(?= [|] |$)", line.strip()):
                    if part.split()[0] in COMMANDS:
                        yield page, shlex.split(part, comments=True)


COMMANDS = next(action.choices for action in build_parser()._actions if action.dest == "command")


@pytest.mark.parametrize(
    ("page", "arguments"), [pytest.param(*each, id=" ".join(each[1])) for each in commands()]
)
def test_commands_in_blocks_are_accepted(page: Path, arguments: list[str]) -> None:
    build_parser().parse_args(arguments)
    known = COMMANDS[arguments[0]]._option_string_actions  # a parser also takes the beginnings of options
    assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= set(known)


def test_options_in_the_text_exist() -> None:
    for page in PAGES:
        for span in re.findall(r"`guardengine ([^`\n]+)`", page.read_text()):
            command, *rest = span.split()
            if command in COMMANDS:
                known = COMMANDS[command]._option_string_actions
                assert {word for word in rest if word.startswith("--")} <= set(known), (page, span)
