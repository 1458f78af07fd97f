"""Undelivered labels: which are returned next, in which order, and which are not returned any more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from guardengine.core.undelivered import Undelivered


def label(stream_id: str, position: int) -> Any:
    return SimpleNamespace(stream_id=stream_id, position=position)


A, B = (SimpleNamespace(stream_id=name) for name in "ab")
LABELS = [label("a", 1), label("b", 1), label("a", 2), label("b", 2)]


@pytest.fixture
def undelivered() -> Undelivered:
    undelivered = Undelivered()
    undelivered.add(LABELS[2:])
    undelivered.put_back(LABELS[:2])
    return undelivered


def test_order(undelivered: Undelivered) -> None:
    assert list(undelivered) == LABELS
    assert len(undelivered) == 4
    assert undelivered.pop_all() == LABELS
    assert (len(undelivered), undelivered.pop_all()) == (0, [])


def test_a_rollback_drops_a_streams_labels_from_a_position_on(undelivered: Undelivered) -> None:
    undelivered.drop(A, 2)  # type: ignore[arg-type]
    assert list(undelivered) == [LABELS[0], LABELS[1], LABELS[3]]
    assert (undelivered.num_of(A), undelivered.num_of(B)) == (1, 2)  # type: ignore[arg-type]
    undelivered.drop(B)  # type: ignore[arg-type]
    assert list(undelivered) == [LABELS[0]]


def test_labels_that_their_streams_books_have_are_dropped(undelivered: Undelivered) -> None:
    undelivered.drop_all_of([B])  # type: ignore[list-item]
    assert list(undelivered) == [LABELS[0], LABELS[2]]
