"""Parametrizing by pairs of values, where a full grid of them says little more.

A fault in a kernel or a template nearly always shows with one value, or with two together; a grid of five axes tries
every five. `grid(a=..., b=..., c=...)` has each pair of values of two axes in some case, `grid(3, ...)` each triple.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def covering(strength: int, sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Cases, as indices into axes of these sizes, so that any `strength` axes have all their combinations.

    Greedy and without chance: each case begins with the first combination that is missing, and takes for each other
    axis the first value that adds the most.
    """
    strength = min(strength, len(sizes))
    missing: dict[tuple[tuple[int, int], ...], None] = {}
    for axes in combinations(range(len(sizes)), strength):
        for values in product(*(range(sizes[axis]) for axis in axes)):
            missing[tuple(zip(axes, values, strict=True))] = None
    cases = []
    while missing:
        case = dict(next(iter(missing)))
        for axis in range(len(sizes)):
            if axis not in case:
                gains = [_covered({**case, axis: value}, axis, missing) for value in range(sizes[axis])]
                case[axis] = gains.index(max(gains))
        for axes in combinations(range(len(sizes)), strength):
            missing.pop(tuple((axis, case[axis]) for axis in axes), None)
        cases.append(tuple(case[axis] for axis in range(len(sizes))))
    return cases


def _covered(case: dict[int, int], new: int, missing: dict[tuple[tuple[int, int], ...], None]) -> int:
    """How many missing combinations with the axis `new` agree with a case as far as it goes."""
    return sum(
        any(axis == new for axis, _ in each) and all(case.get(axis, value) == value for axis, value in each)
        for each in missing
    )


def grid(
    strength: int = 2, /, *, indirect: Sequence[str] = (), **axes: Sequence[Any]
) -> pytest.MarkDecorator:
    """@grid(a=[1, 2], b=["x", "y"], c=[...]): a parametrize whose cases have each pair (or triple) of values.

    indirect: the axes whose values go to fixtures of their names.
    """
    names, cases = list(axes), []
    for chosen in covering(strength, [len(values) for values in axes.values()]):
        values = [axes[name][index] for name, index in zip(names, chosen, strict=True)]
        ids = (
            f"{name}{index}" if isinstance(value, (list, tuple, dict)) else str(value)
            for name, index, value in zip(names, chosen, values, strict=True)
        )
        cases.append(pytest.param(*values, id="-".join(ids)))
    return pytest.mark.parametrize(names, cases, indirect=indirect)
