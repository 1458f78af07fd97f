"""The answers' grammar, guesses along it, and parsing: without a model."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardengine.checkpoint.model_config import RISKS
from guardengine.errors import CheckpointError
from guardengine.gen.answers import ChosenAnswer
from guardengine.gen.grammar import Grammar, Walk
from guardengine.gen.parse import CATEGORIES, parse
from guardengine.labels import Role

END = 0
WORD = re.compile(r" ?[A-Za-z]+|\n|[^A-Za-z\n]")


class Words:
    """A tokenizer of words, each with the space before it."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, text: str) -> list[int]:
        return [self.ids.setdefault(word, len(self.ids) + 1) for word in WORD.findall(text)]

    def text(self, ids: list[int]) -> str:
        words = {number: word for word, number in self.ids.items()}
        return "".join(words.get(number, "") for number in ids)


def answers(role: str) -> st.SearchStrategy[str]:
    names = [name for name in CATEGORIES if role == "user" or name != "Jailbreak"]
    lists = st.just(["None"]) | st.lists(st.sampled_from(names), min_size=1, unique=True)
    refusal = st.just("") if role == "user" else st.sampled_from(["\nRefusal: Yes", "\nRefusal: No"])
    return st.builds(
        lambda risk, chosen, tail: f"Safety: {risk}\nCategories: {', '.join(chosen)}{tail}",
        st.sampled_from(RISKS),
        lists,
        refusal,
    )


ROLES: tuple[Role, ...] = ("user", "assistant")
CASES = st.sampled_from(ROLES).flatmap(lambda role: st.tuples(st.just(role), answers(role)))


@given(CASES)
def test_every_answer_is_a_walk_and_says_what_it_says(case: tuple[Role, str]) -> None:
    role, text = case
    encode = Words()
    grammar = Grammar(encode, role, END)
    walk = Walk(grammar)
    ids = [*encode(text), END]
    assert all(walk.feed(token) for token in ids)
    assert walk.has_ended
    assert len(ids) <= grammar.num_tokens
    parsed = parse(text, has_refusal=role == "assistant")
    assert (
        f"Safety: {parsed.safety}\nCategories: {', '.join(parsed.categories) or 'None'}"
        == text.partition("\nR")[0]
    )
    assert parsed.refusal == (text.rpartition(" ")[2] if role == "assistant" else None)


@given(CASES, st.data())
def test_a_walk_takes_nothing_else(case: tuple[Role, str], data: st.DataObject) -> None:
    role, text = case
    encode = Words()
    grammar = Grammar(encode, role, END)
    ids = [*encode(text), END]
    cut = data.draw(st.integers(0, len(ids)))
    walk = Walk(grammar)
    assert all(walk.feed(token) for token in ids[:cut])
    choice = walk.choice
    allowed = set(choice.token_ids) if choice else set(walk.forced[:1])
    for token in range(len(encode.ids) + 2):
        if token not in allowed:
            assert not walk.feed(token)
    assert walk.has_ended == (cut == len(ids))
    assert all(walk.feed(token) for token in ids[cut:])


@settings(max_examples=200)
@given(CASES)
def test_choosing_reaches_any_answer_whatever_was_guessed(case: tuple[Role, str]) -> None:
    """A head that wants one answer gets it: fed, rolled back and read where the moves say."""
    role, text = case
    encode = Words()
    grammar = Grammar(encode, role, END)
    target = [*encode(text), END]
    answer = ChosenAnswer(grammar)
    fed: list[int] = []
    move = answer.start()
    num_moves = 0
    while move is not None:
        num_moves += 1
        assert move.num_kept <= len(fed)
        fed = fed[: move.num_kept] + list(move.token_ids)
        assert fed[: move.num_kept] == target[: move.num_kept]
        assert list(move.reads) == sorted(move.reads)
        assert move.reads[-1] == len(fed) - 1  # nothing is fed that no choice depends on
        logits = np.full((len(move.reads), len(grammar.token_ids)), -1.0, dtype=np.float32)
        for row, read in enumerate(move.reads):
            if fed[: read + 1] == target[: read + 1]:
                logits[row, grammar.token_ids.index(target[read + 1])] = 1
        move = answer.advance(logits)
    assert answer.token_ids == target
    if text.startswith("Safety: Safe\nCategories: None"):
        assert num_moves == 1
    assert num_moves <= 3 + 2 * text.count(",")


def test_odds_are_of_the_first_choice_of_each_kind() -> None:
    encode = Words()
    grammar = Grammar(encode, "user", END)
    answer = ChosenAnswer(grammar)
    move = answer.start()
    assert move is not None
    logits = np.zeros((len(move.reads), len(grammar.token_ids)), dtype=np.float32)
    logits[:, grammar.token_ids.index(encode(" Safe")[0])] = np.log(2)
    assert answer.advance(logits) is None or answer.odds
    assert answer.odds["safety"] == pytest.approx({"Safe": 0.5, "Unsafe": 0.25, "Controversial": 0.25})
    assert answer.odds["category"] == pytest.approx(dict.fromkeys(["None", *CATEGORIES], 0.1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_break_an_answer(value: float) -> None:
    answer = ChosenAnswer(Grammar(Words(), "user", END))
    move = answer.start()
    assert move is not None
    logits = np.full((len(move.reads), len(answer._columns)), value, dtype=np.float32)
    assert answer.advance(logits) is None
    assert answer.is_broken


def test_a_tokenizer_without_single_choices_is_refused() -> None:
    with pytest.raises(CheckpointError, match="same token"):
        Grammar(lambda text: [1 + ord(letter) for letter in text], "user", END)
    encode = Words()
    with pytest.raises(CheckpointError, match="another way"):
        Grammar(lambda text: encode(text if len(text) < 30 else text[::-1]), "user", END)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Safety: Unsafe\nCategories: Non-violent Illegal Acts\nRefusal: No",
            ("Unsafe", ("Non-violent Illegal Acts",), "No"),
        ),
        (
            "Safety: Unsafe\nCategories: Violent, PII, Violent\nRefusal: Yes",
            ("Unsafe", ("Violent", "PII"), "Yes"),
        ),
        ("Safety: Safe\nCategories: None", ("Safe", (), None)),
        ("Sure! Safety: Controversial", ("Controversial", (), None)),
        ("Safety: unsafe\nCategories: Violent", ("Unparsable", ("Violent",), None)),
        (
            "Violent\nSafety: Unsafe\nCategories: none",
            ("Unsafe", (), None),
        ),  # only the categories' line counts
        ("Safety: Maybe", ("Unparsable", (), None)),
        ("", ("Unparsable", (), None)),
    ],
)
def test_parsing(text: str, expected: tuple[str, tuple[str, ...], str | None]) -> None:
    assert tuple(parse(text, has_refusal=True)) == expected
    assert parse(text, has_refusal=False).refusal is None


@given(st.text(alphabet="Safety: UnsafeCtrolvi\nRusYNo", max_size=80))
def test_parsing_never_raises_and_never_invents(text: str) -> None:
    parsed = parse(text, has_refusal=True)
    assert parsed.safety == "Unparsable" or f"Safety: {parsed.safety}" in text
