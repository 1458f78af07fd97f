"""The worked example of guardengine/text/spans.py: its code runs as written, and its ids and spans are Qwen3's."""

from __future__ import annotations

import doctest
from pathlib import Path

from guardengine.text import spans, vocabulary
from guardengine.text.retokenizer import Retokenizer
from guardengine.text.spans import HeldText
from guardengine.text.tokenizer import Tokenizer


def test_the_worked_example_runs():
    result = doctest.testmod(spans)
    assert result.attempted >= 6
    assert result.failed == 0


def test_the_worked_example_is_what_the_retokenizer_makes_of_its_text(tmp_path: Path):
    assert vocabulary.write_tokenizer_files(tmp_path, 8192), (
        "install the dev dependencies: dashscope is missing"
    )
    tokenizer = Tokenizer.from_dir(tmp_path)
    piece = Retokenizer(tokenizer).feed(HeldText(), "Oh 👍!", is_final=True)
    assert piece.token_ids == [11908, 61804, 235, 0]
    assert piece.spans == [(0, 2, 0, 2), (2, 4, 2, 7), (3, 4, 3, 7), (4, 5, 7, 8)]
    assert (piece.held.num_chars, piece.held.num_bytes) == (5, 8)
