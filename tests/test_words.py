"""The words of the code: docstrings that stand alone, and a documented public API."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import guardengine

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path for name in ("guardengine", "kernels", "benchmarks") for path in (ROOT / name).rglob("*.py")
)
CLASSES_AND_FUNCTIONS = [
    name
    for name in guardengine.__all__
    if inspect.isclass(value := getattr(guardengine, name)) or callable(value)
]


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def public_functions(name: str) -> Iterator[tuple[str, Any]]:
    """A function of the public API; or the public methods of a class, inherited ones included."""
    value = getattr(guardengine, name)
    if not inspect.isclass(value):
        yield name, value
        return
    ours = [kind for kind in value.__mro__ if kind.__module__.startswith("guardengine.")]
    for method, raw in (item for kind in ours for item in vars(kind).items()):
        function = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
        if inspect.isfunction(function) and not method.startswith("_"):
            yield f"{name}.{method}", function


def undocumented(name: str) -> list[str]:
    """What a name's docstrings leave out."""
    value = getattr(guardengine, name)
    missing = [] if (value.__doc__ or "").strip() else [f"{name} has no docstring"]
    for where, function in public_functions(name):
        text = inspect.getdoc(function) or ""
        parameters = [each for each in inspect.signature(function).parameters if each not in ("self", "cls")]
        arguments = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
        missing += [
            f"{where}: {each}" for each in parameters if f"    {each}: " not in arguments.replace("*", "")
        ]
    return missing


def test_docstrings_stand_alone() -> None:
    """A docstring is read by itself, in an editor or on a page of the documentation."""
    for path in FILES:
        for text in docstrings(path):
            assert not text.startswith("The same"), f"{path}: {text[:60]!r} refers to another docstring"


@pytest.mark.parametrize("name", CLASSES_AND_FUNCTIONS)
def test_the_public_api_says_its_arguments(name: str) -> None:
    missing = undocumented(name)
    assert not missing, f"no docstring, or no line under Args: {missing}"
