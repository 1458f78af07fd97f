"""The helper of parametrized tests has what it says: all pairs, all triples, in far fewer cases than the grid."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from pairwise import covering, grid


@pytest.mark.parametrize("sizes", [(3,), (2, 2), (7, 4, 3, 2), (1, 5, 1), (3, 3, 3, 3, 3), (15, 4, 3)])
@pytest.mark.parametrize("strength", [2, 3])
def test_every_combination_of_so_many_axes_is_in_a_case(sizes: tuple[int, ...], strength: int) -> None:
    cases = covering(strength, sizes)
    assert len(set(cases)) == len(cases)
    for axes in combinations(range(len(sizes)), min(strength, len(sizes))):
        found = {tuple(case[axis] for axis in axes) for case in cases}
        assert found == set(product(*(range(sizes[axis]) for axis in axes)))
    assert covering(strength, sizes) == cases


def test_pairs_are_far_fewer_than_the_grid() -> None:
    assert len(covering(2, (7, 4, 3, 2))) <= 32  # of 168; 28 are needed
    assert len(covering(2, (3,) * 5)) <= 18  # of 243


def test_parameters_keep_their_names_and_values() -> None:
    mark = grid(a=[1, 2], b=[[3], [4]])
    names, cases = mark.args
    assert names == ["a", "b"]
    assert [case.values for case in cases] == [(1, [3]), (1, [4]), (2, [3]), (2, [4])]
    assert [case.id for case in cases] == ["1-b0", "1-b1", "2-b0", "2-b1"]
