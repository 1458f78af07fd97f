"""The files that measurements write: numbers as JSON, tables as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guardengine.errors import ConfigError


def check_writable(path: Path) -> None:
    """Raise ConfigError when a file cannot be written, before minutes of measuring."""
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a folder" if path.is_dir() else f"cannot be written: {path.parent} is not a folder"
        raise ConfigError(f"{path} {problem}; give a file in a folder that exists")


def write_json(record: Mapping[str, Any], path: Path) -> None:
    """Write a record as JSON. Raises ConfigError when the file cannot be written."""
    try:
        path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error}); give another file") from error


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, right-aligned, which is readable as text too."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    cells = [header, ["-" * (width - 1) + ":" for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    )
