"""The README is short and tells the truth: its example is the file that runs, its packages are the packages."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import ROOT, block, printed_by

README = ROOT / "README.md"
TEXT = README.read_text()


def test_the_readme_has_at_most_180_lines() -> None:
    assert len(TEXT.splitlines()) <= 180


@pytest.mark.slow
def test_the_example_is_the_file_and_runs(checkpoints: Callable[..., Path]) -> None:
    source = block(README, "examples/embed.py")
    assert len([line for line in source.splitlines() if line and not line.startswith('"""')]) <= 15
    printed = printed_by(README, "embed.py", checkpoints(dtype="float32"))
    recorded = block(README, "output").splitlines()
    assert len(printed) == len(recorded)
    shape = r"prompt: \w+|\d+ \d+ \w+ [01]\.\d{3}|Verdict\(action="
    for ours, readme in zip(printed, recorded, strict=True):
        assert re.match(shape, ours)
        assert re.match(shape, readme)
        assert ours.split()[:2] == readme.split()[:2] or not ours[0].isdigit()  # same positions and ids


def test_every_package_has_its_line() -> None:
    listed = section("## The packages")
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", listed, re.MULTILINE))))
    assert named == {path.parent.name for path in (ROOT / "guardengine").glob("*/__init__.py")}


def test_the_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| (`.*?) \|", section("## Install"), re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", "".join(rows)))
    assert {"engine", "client", "server"} <= named <= set(extras)


def test_there_are_nine_doors() -> None:
    assert section("## Which door is yours").count("\n|") == 2 + 9


def test_the_life_of_a_token_has_eight_steps() -> None:
    assert re.findall(r"^(\d)\.", section("## The life of a token"), re.MULTILINE) == list("12345678")


def section(title: str) -> str:
    start = TEXT.index(title)
    return TEXT[start : TEXT.find("\n## ", start)]
