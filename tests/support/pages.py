"""What tests of the documents share: the pages, their fenced blocks, and what the blocks' programs print."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>.+?) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^ *```", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block: the HTML comment directly above it ("" for none), its language, and its lines."""

    mark: str
    language: str
    body: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [
        Block(match["mark"] or "", match["language"], match["body"])
        for match in _BLOCK.finditer(page.read_text())
    ]


def block(page: Path, mark: str) -> str:
    """The body of the one block with this mark."""
    (body,) = (each.body for each in blocks(page) if each.mark == mark)
    return body


def printed_by(page: Path, example: str, *arguments: object) -> list[str]:
    """What a file of examples/ prints, which must be the file that the page shows."""
    path = ROOT / "examples" / example
    assert block(page, f"examples/{example}") == path.read_text()
    command = [sys.executable, "-P", str(path), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
