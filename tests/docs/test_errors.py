"""The tree of errors that errors.py draws is the real one, and every error says when it comes and what to do."""

from __future__ import annotations

import re

import pytest

import guardengine
from guardengine import errors

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and value.__module__ == errors.__name__
}


def drawn_parents() -> dict[str, str]:
    """Each error's parent by the drawing: the nearest line above it that is indented less."""
    parents, above = {}, []
    for line in errors.__doc__.splitlines():
        if not (match := re.match(r"    ([ │├└─]*)(\w+)", line)):
            continue
        indent, name = len(match[1]), match[2]
        above = [(column, other) for column, other in above if column < indent]
        if above:
            parents[name] = above[-1][1]
        above.append((indent, name))
    return parents


def test_the_drawn_tree_is_the_real_one() -> None:
    assert drawn_parents() == {name: value.__bases__[0].__name__ for name, value in CLASSES.items()}
    assert all(len(value.__bases__) == 1 for value in CLASSES.values())


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_says_when_it_comes_and_what_to_do(name: str) -> None:
    if name not in ("GuardEngineError",):
        assert re.search(r"\n    When: .+\n    What to do: ", CLASSES[name].__doc__, re.DOTALL)


def test_every_error_that_users_meet_is_exported() -> None:
    exported = {name for name in guardengine.__all__ if name in CLASSES}
    assert set(CLASSES) - exported == {"LabelsDiffer"}  # the benchmark's own
    assert all(getattr(guardengine, name) is CLASSES[name] for name in exported)


def test_one_class_catches_ids_and_text() -> None:
    assert issubclass(errors.InvalidTokens, errors.InvalidInput)
    assert issubclass(
        errors.InvalidText, errors.InvalidTokens
    )  # code that catches the ids' error catches text's too
