"""The README tells the truth: its example is the file that runs, its tree is the tree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from guardengine import errors

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(marker: str) -> str:
    """The fenced block that follows an HTML comment."""
    match = re.search(rf"<!-- {re.escape(marker)} -->\n```\w*\n(.*?)```", README, re.DOTALL)
    assert match, marker
    return match[1]


def test_the_example_is_the_file_and_runs(checkpoints) -> None:
    source = block("examples/embed.py")
    assert len([line for line in source.splitlines() if line and not line.startswith('"""')]) <= 15
    printed = printed_by("embed.py", checkpoints(dtype="float32"))
    recorded = block("output").splitlines()
    assert len(printed) == len(recorded)
    shape = r"prompt: \w+|\d+ \d+ \w+ [01]\.\d{3}|Verdict\(action="
    for ours, readme in zip(printed, recorded, strict=True):
        assert re.match(shape, ours)
        assert re.match(shape, readme)
        assert ours.split()[:2] == readme.split()[:2] or not ours[0].isdigit()  # same positions and ids


def printed_by(example: str, folder: Path) -> list[str]:
    """What an example prints, which is the file that the README shows."""
    path = ROOT / "examples" / example
    assert block(f"examples/{example}") == path.read_text()
    run = subprocess.run(
        [sys.executable, "-P", str(path), str(folder)], capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()


def test_the_gen_example_is_the_file_and_runs(checkpoints) -> None:
    printed = printed_by("gen.py", checkpoints("gen-tiny"))
    recorded = block("gen output").splitlines()
    assert len(printed) == len(recorded) == 6
    for output in (printed, recorded):
        for answer, odds, verdict in (output[:3], output[3:]):
            assert re.match(r"'Safety: \w+\\nCategories: ", answer)
            assert odds.startswith("{'Safe': 0.")
            assert verdict.startswith("Verdict(action=")


def test_the_loop_is_the_file_and_runs(checkpoints) -> None:
    printed = printed_by("guarded_loop.py", checkpoints())
    for lines in (printed, block("guarded output").splitlines()):
        assert sum(line.startswith("Verdict(") for line in lines) == 2
        assert all(re.match(r"['\"]|   \[|Verdict\(action=", line) for line in lines)


def test_the_tree_is_complete() -> None:
    tree = README[README.index("## The tree") : README.index("Why it is so")]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    present = {path.name for path in (ROOT / "guardengine").glob("*.py") if not path.name.startswith("_")}
    assert named == present


def test_every_error_is_listed() -> None:
    listed = set(re.findall(r"`(\w+)`", README[README.index("## Errors") :]))
    public = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert public - {"GuardEngineError", "IntegrityError"} <= listed


def test_every_promise_names_an_existing_test() -> None:
    for path in re.findall(r"`(tests/[\w/]+\.py)`", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", ["README.md", "DECISIONS.md", "SPEED.md", "CHANGELOG.md", "LICENSE"])
def test_the_documents_are_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 500
