"""HeldItems: nothing uncleared comes out and nothing is lost, however it is added, taken and cut."""

from __future__ import annotations

import random

import pytest

from guardengine.guarding.held import HeldItems, cut_sequence


@pytest.mark.parametrize("start", [0, 7])
def test_what_is_taken_is_the_beginning_of_what_is_kept(start: int) -> None:
    for seed in range(200):
        rng = random.Random(seed)
        held, kept, out, cleared = HeldItems[str](cut_sequence, start), "", "", start
        for number in range(20):
            word = str(number) * rng.randint(0, 5)
            held.add(word, len(word))
            kept += word
            cleared = rng.randint(cleared, start + len(kept))
            out += "".join(held.take(rng.randint(0, cleared)))
            assert len(out) <= cleared - start
            assert kept.startswith(out)
            if not rng.randrange(4):
                held.cut(cleared)
                kept = kept[: cleared - start]
        out += "".join(held.rest())
        assert out == kept
        assert held.take(10**9) == held.rest() == []


def test_items_that_are_not_cut_wait_until_all_of_them_is_cleared() -> None:
    held = HeldItems[str](start=3)
    for word in ("one", "", "three", ""):
        held.add(word, len(word))
    assert held.take(5) == []
    assert held.take(6) == ["one", ""]
    assert held.take(10) == []
    held.cut(10)
    assert held.rest() == []
