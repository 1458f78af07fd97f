"""What a handle says of its stream without a copy of all of it, and where a reply may be cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import guardengine
from guardengine import Engine, Policy

USER = {"role": "user", "content": "What is the capital of France?"}
REPLY = "The capital is Paris (巴黎是法国的首都), n'est-ce pas? 👩‍👩‍👧 It is."
LETS_PASS = Policy.strict(risk_thresholds={"Unsafe": 1.0, "Controversial": 1.0})


@pytest.fixture(scope="module")
def engine(checkpoints: Callable[..., Path]) -> Iterator[Engine]:
    with Engine.from_pretrained(checkpoints(), kv_cache_bytes=2**23, max_model_len=1024) as engine:
        yield engine


def test_labels_are_counted_and_read_from_any_place(engine: Engine) -> None:
    with engine.open(messages=[USER], policy=LETS_PASS) as stream:
        for count in (0, 3, 5):
            if count:
                stream.append([1000 + i for i in range(count)])
            assert stream.num_assistant_tokens == stream.num_labels + count
            engine.run()
            assert stream.num_labels == len(stream.labels) == stream.num_assistant_tokens
            for start in range(len(stream.labels) + 2):
                assert stream.labels_from(start) == stream.labels[start:]
        kept = stream.labels_from(0)
        kept.clear()  # a copy
        assert stream.num_labels == 8


def test_places_in_a_replys_text(engine: Engine) -> None:
    with engine.open(messages=[USER], policy=LETS_PASS) as stream:
        assert (stream.accepted_chars, stream.chars_within(5), stream.cut_before(5)) == (0, 0, (5, 0))
        stream.append_text(REPLY)
        assert stream.accepted_chars == len(REPLY) > len(REPLY) - len(stream.held_text)
        engine.run()
        assert stream.chars_within(stream.verdict.cleared) == stream.cleared_chars
        stream.finish_text(end_turn=False)
        engine.run()
        spans = [stream.span(label) for label in stream.labels]
        for num_tokens in range(stream.num_labels + 1):
            whole = [span for span in spans[num_tokens:] if span is not None]
            assert stream.chars_within(num_tokens) == min((span[0] for span in whole), default=len(REPLY))
            num_kept, num_chars = stream.cut_before(num_tokens)
            assert num_kept <= num_tokens
            assert num_chars == stream.chars_within(num_kept) <= stream.chars_within(num_tokens)


def test_a_reply_can_be_ended_once(engine: Engine) -> None:
    with engine.open(messages=[USER]) as stream:
        assert stream.can_end_turn
        stream.append_text("Yes")
        assert stream.can_end_turn
        stream.finish_text()
        assert not stream.can_end_turn
        stream.append([3838], role="user")
        assert stream.can_end_turn
    with engine.open(token_ids=[1, 2, 3]) as stream:
        assert not stream.can_end_turn


def test_a_streams_books_are_read_through_its_handle() -> None:
    root = Path(guardengine.__file__).parent
    outside = [path for path in root.rglob("*.py") if path.parent != root / "engine"]
    assert [path for path in outside if re.search(r"(?<!self)\._state\b", path.read_text())] == []
