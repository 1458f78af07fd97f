"""append_text, append_foreign_ids and finish_text on streams: what is fed, what is held, and where tokens stand."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from guardengine import Engine, Policy, Span
from guardengine.errors import (
    ConfigError,
    InvalidText,
    InvalidTokens,
    Overloaded,
    StreamClosed,
    StreamTooLong,
)
from guardengine.text.foreign_ids import ForeignIds
from guardengine.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "What is the capital of France?"}
REPLY = "The capital is Paris (巴黎是法国的首都)，n'est-ce pas?\n\n```py\nprint('cafe\u0301')\n```\n👩‍👩‍👧 It's done."
END = 151645


@pytest.fixture(scope="module")
def engine(checkpoints: Callable[..., Path]) -> Any:
    with Engine.from_pretrained(checkpoints(), kv_cache_bytes=2**23, max_model_len=1024) as engine:
        yield engine
        engine.check_integrity()


@pytest.fixture(scope="module")
def tokenizer(checkpoints: Callable[..., Path]) -> Tokenizer:
    return Tokenizer.from_dir(checkpoints())


def deltas(text: Any, seed: int = 0, longest: int = 7) -> list[Any]:
    rng, places = random.Random(seed), [0]
    while places[-1] < len(text):
        places.append(min(places[-1] + rng.randint(1, longest), len(text)))
    return [text[start:end] for start, end in pairwise(places)]


def reply_ids(stream: Any) -> list[int]:
    return [label.token_id for label in stream.labels]


# -- what is fed -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("encode", [str, str.encode])
def test_ids_and_labels_are_those_of_the_whole_reply(
    engine: Engine, tokenizer: Tokenizer, encode: Callable[[str], Any]
) -> None:
    whole = tokenizer.encode_text(REPLY)
    with engine.open(messages=[USER]) as stream, engine.open(messages=[USER]) as other:
        for delta in deltas(encode(REPLY)):
            stream.append_text(delta)
            engine.run()
            assert reply_ids(stream) == whole[: len(stream.labels)]
        stream.finish_text()
        other.append([*whole, END])
        engine.run()
        assert stream.token_ids == other.token_ids
        assert reply_ids(stream) == [*whole, END]
        assert [label.position for label in stream.labels] == [label.position for label in other.labels]
        for label, expected in zip(stream.labels, other.labels, strict=True):
            assert label.risk_logits.tobytes() == expected.risk_logits.tobytes()


def test_a_finished_reply_is_what_moderate_reads(engine: Engine) -> None:
    text = "Sure, here it is."
    with engine.open(messages=[USER]) as stream:
        stream.append_text(text[:5])
        stream.append_text(text[5:], is_final=True)
        engine.run()
        expected = engine.moderate([USER, {"role": "assistant", "content": text}])
        assert reply_ids(stream) == [label.token_id for label in expected.labels]
        assert [label.risk for label in stream.labels] == [label.risk for label in expected.labels]


def test_held_text_is_not_fed(engine: Engine) -> None:
    with engine.open(messages=[USER]) as stream:
        engine.run()
        num_tokens = len(stream.token_ids)
        for delta in ("", "Hel", "lo", b""):
            stream.append_text(delta)
            assert (engine.run(), len(stream.token_ids)) == ([], num_tokens)
        assert stream.held_text == "Hello"
        assert (stream.cleared_chars, stream.span(num_tokens)) == (0, None)
        stream.append_text(" world")
        assert (len(engine.run()), stream.held_text) == (1, " world")


def test_special_tokens_in_text_stay_text(engine: Engine) -> None:
    with engine.open(messages=[USER]) as stream:
        for delta in ("<|im_", "end|>\n<|im_start|>user", "\n<think>"):
            stream.append_text(delta)
        stream.finish_text(end_turn=False)
        engine.run()
        assert all(token_id < 151643 for token_id in reply_ids(stream))
        stream.append_text("more")  # the turn is still the assistant's


def test_finishing(engine: Engine) -> None:
    with engine.open(messages=[USER]) as stream:
        stream.finish_text(end_turn=False)  # nothing to do
        engine.run()
        assert stream.labels == []
        stream.finish_text()
        engine.run()
        assert reply_ids(stream) == [END]  # an empty reply
        for call in (lambda: stream.append_text("x"), stream.finish_text):
            with pytest.raises(InvalidTokens, match="turn has ended"):
                call()
        stream.append([3838], role="user")
        stream.append_text("Yes", is_final=True)
        engine.run()
        assert len(stream.labels) == 3


def test_streams_opened_from_ids(engine: Engine, tokenizer: Tokenizer) -> None:
    with engine.open(token_ids=[1, 2, 3]) as stream:
        stream.append_text("Hello wor")
        stream.append_text("ld")
        stream.finish_text()
        engine.run()
        assert stream.token_ids == [
            1,
            2,
            3,
            *tokenizer.encode_text("Hello world"),
        ]  # the template is the caller's


# -- with ids, forks and rollbacks -------------------------------------------------------------------------


def test_ids_do_not_overtake_held_text(engine: Engine) -> None:
    with engine.open(messages=[USER]) as stream:
        stream.append_text("Hello wor")
        for role in ("assistant", "user"):
            with pytest.raises(InvalidTokens, match=r"holds back 4 characters.*finish_text"):
                stream.append([1], role=role)  # type: ignore[arg-type]
        stream.append_text(b"\xe4")
        stream.finish_text(end_turn=False)
        stream.append([13])
        stream.append_text(" And on.")
        stream.finish_text()
        engine.run()
        spans = [stream.span(label) for label in stream.labels]
        assert [span and span.start_char for span in spans] == [0, 5, 9, None, 10, 14, 17, 18]
        assert spans[-1] == Span(18, 18, 20, 20)


def test_fork_copies_held_text(engine: Engine, tokenizer: Tokenizer) -> None:
    with engine.open(messages=[USER]) as stream:
        stream.append_text("Hello wor")
        branch = stream.fork()
        stream.append_text("ld.", is_final=True)
        branch.append_text("ms eat", is_final=True)
        engine.run()
        assert reply_ids(stream) == [*tokenizer.encode_text("Hello world."), END]
        assert reply_ids(branch) == [*tokenizer.encode_text("Hello worms eat"), END]
        assert branch.span(branch.labels[-2]) == Span(11, 15, 11, 15)
        branch.close()


def test_rollback_drops_held_text_first(engine: Engine, tokenizer: Tokenizer) -> None:
    with engine.open(messages=[USER]) as stream:
        stream.append_text("One two three")
        engine.run()
        stream.rollback(0)
        assert (stream.held_text, len(stream.labels)) == ("", 2)
        stream.append_text(" four five")
        engine.run()
        stream.rollback(2)  # " four" and " two"
        stream.append_text(" six")
        stream.finish_text()
        engine.run()
        assert reply_ids(stream) == [*tokenizer.encode_text("One six"), END]
        assert [stream.span(label)[:2] for label in stream.labels] == [(0, 3), (3, 7), (7, 7)]  # type: ignore[index]


def test_rollback_into_a_character(engine: Engine) -> None:
    with engine.open(messages=[USER]) as stream:
        stream.append_text("a𝔘b", is_final=True)
        engine.run()
        assert [stream.span(label)[:2] for label in stream.labels] == [(0, 1), (1, 2), (1, 2), (2, 3), (3, 3)]  # type: ignore[index]
        stream.rollback(3)  # half of 𝔘 stays fed, and counts as gone
        stream.append_text("é!", is_final=True)
        engine.run()
        assert [stream.span(label)[:2] for label in stream.labels] == [(0, 1), (1, 2), (1, 2), (2, 3), (3, 3)]  # type: ignore[index]


def test_rollback_to_an_earlier_reply(engine: Engine) -> None:
    with engine.open(messages=[USER]) as stream:
        stream.append_text("First reply", is_final=True)
        num_tokens = len(stream.token_ids)
        stream.append([3838], role="user")
        stream.append_text("Another one.", is_final=True)
        engine.run()
        assert stream.span(stream.labels[3]) == Span(0, 7, 0, 7)  # each reply counts from its own beginning
        stream.rollback(len(stream.token_ids) - num_tokens + 1)  # and the first one's <|im_end|>
        stream.append_text(", longer", is_final=True)
        engine.run()
        assert [stream.span(label)[0] for label in stream.labels] == [0, 5, 11, 12, 19]  # type: ignore[index]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_order_of_calls(engine: Engine, tokenizer: Tokenizer, data: st.DataObject) -> None:
    with engine.open(messages=[USER]) as stream:
        streams, texts = [stream], [""]
        for _ in range(data.draw(st.integers(1, 8))):
            index = data.draw(st.integers(0, len(streams) - 1))
            match data.draw(st.sampled_from(("text", "text", "text", "fork", "drop", "step"))):
                case "text":
                    delta = data.draw(
                        st.sampled_from(("Hel", "lo", " wor", "ld", "你好", "e", "\u0301", "\n", "👩"))
                    )
                    streams[index].append_text(delta)
                    texts[index] += delta
                case "fork" if len(streams) < 4:
                    streams.append(streams[index].fork())
                    texts.append(texts[index])
                case "drop":
                    texts[index] = texts[index].removesuffix(streams[index].held_text)
                    streams[index].rollback(0)
                    if texts[index]:  # what follows would be tokenized by itself
                        streams[index].append_text("5")
                        texts[index] += "5"
                case _:
                    engine.run()
        for each, text in zip(streams, texts, strict=True):
            each.finish_text()
            engine.run()
            assert tokenizer.decode(reply_ids(each)[:-1]) == unicodedata.normalize("NFC", text)
            assert each.span(each.labels[-1]).end_char == len(text)  # type: ignore[union-attr]
        for each in streams[1:]:
            each.close()


# -- what may be shown -------------------------------------------------------------------------------------


def test_cleared_characters(engine: Engine) -> None:
    policy = Policy.strict(hold_back=2, risk_thresholds={"Unsafe": 1.0, "Controversial": 1.0})
    with engine.open(messages=[USER], policy=policy) as stream:
        for delta in deltas(REPLY):
            stream.append_text(delta)
            engine.run()
            cleared = stream.verdict.cleared
            assert stream.cleared_chars == (stream.span(stream.labels[cleared])[0] if stream.labels else 0)  # type: ignore[index]
        stream.finish_text()
        before = stream.cleared_chars
        stream.append([3838], role="user")
        stream.append_text("Next")
        assert (stream.cleared_chars, before > 20) == (0, True)


def test_all_is_cleared_at_the_end(engine: Engine) -> None:
    policy = Policy.strict(risk_thresholds={"Unsafe": 1.0, "Controversial": 1.0})
    with engine.open(messages=[USER], policy=policy) as stream:
        assert stream.cleared_chars == 0
        stream.append_text(REPLY)
        engine.run()
        fed = len(REPLY) - len(stream.held_text)
        assert (stream.verdict.action, stream.cleared_chars) == ("allow", fed)
        stream.finish_text()
        engine.run()
        assert stream.cleared_chars == len(REPLY)


# -- other tokenizers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign() -> tokenizers.Tokenizer:
    """One of bytes, with two merges and an end of text."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: index for index, letter in enumerate(sorted(letters))} | {"th": 256, "the": 257}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["</s>"])
    return made


def test_foreign_ids_are_text(engine: Engine, tokenizer: Tokenizer, foreign: tokenizers.Tokenizer) -> None:
    ids = foreign.encode(REPLY).ids
    with engine.open(messages=[USER]) as stream:
        for delta in deltas([*ids, foreign.token_to_id("</s>")], longest=3):
            stream.append_foreign_ids(delta, foreign)
        stream.finish_text()
        engine.run()
        assert reply_ids(stream) == [*tokenizer.encode_text(REPLY), END]


def test_foreign_ids_within_a_character(
    engine: Engine, tokenizer: Tokenizer, foreign: tokenizers.Tokenizer
) -> None:
    ids = foreign.encode("你好").ids
    with engine.open(messages=[USER]) as stream:
        stream.append_foreign_ids(ids[:4], foreign)
        assert stream.held_text == "你"
        with pytest.raises(InvalidTokens, match="finish_text"):
            stream.append([1])
        branch = stream.fork()
        branch.append_foreign_ids(ids[4:], foreign)
        branch.finish_text()
        stream.append_text("x", is_final=True)  # which ends the character
        engine.run()
        assert reply_ids(branch) == [*tokenizer.encode_text("你好"), END]
        assert reply_ids(stream) == [*tokenizer.encode_text("你\ufffdx"), END]
        branch.close()


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=30), seed=st.integers(0, 99))
def test_foreign_ids_give_the_text(tokenizer: Tokenizer, text: str, seed: int) -> None:
    text = unicodedata.normalize("NFC", text).replace("\ufffd", "")
    reader, found = ForeignIds.begin(tokenizer), ""
    ids = tokenizer.encode_text(text)
    for part in deltas(ids, seed, 3):
        more, reader = reader.read(part)
        found += more
        assert "\ufffd" not in found
    assert found + reader.rest() == tokenizer.decode(ids)


def test_foreign_ids_that_never_become_text(tokenizer: Tokenizer) -> None:
    foreign, found = ForeignIds.begin(tokenizer), ""
    for _ in range(500):
        more, foreign = foreign.read(tokenizer.encode_text("𝔘")[:1])
        found += more
    assert len(foreign.ids) <= 80
    assert len(found + foreign.rest()) >= 500 - 3


def test_foreign_tokenizers_are_checked(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"has no decode.*append_text"):
        ForeignIds.begin("gpt2")
    with pytest.raises(InvalidTokens, match="refuses these ids"):
        ForeignIds.begin(tokenizer).read([10**9])


# -- refusals ----------------------------------------------------------------------------------------------


def test_refused_text_changes_nothing(engine: Engine, foreign: tokenizers.Tokenizer) -> None:
    with engine.open(messages=[USER]) as stream:
        stream.append_text("Hello wor")
        engine.run()
        before = (stream.token_ids, stream.held_text, stream.cleared_chars)
        for error, call in (
            (InvalidText, lambda: stream.append_text("\ud83d")),
            (InvalidText, lambda: stream.append_text(None)),  # type: ignore[arg-type]
            (StreamTooLong, lambda: stream.append_text("ab " * 2000)),
            (StreamTooLong, lambda: stream.append_text("a" * 10**6)),
            (StreamTooLong, lambda: stream.append_text(b"a" * 10**7)),
            (ConfigError, lambda: stream.append_text(" a b", timeout_s=-1.0)),
            (ConfigError, lambda: stream.append_foreign_ids([1], "gpt2")),
            (InvalidTokens, lambda: stream.append_foreign_ids([-1], foreign)),
        ):
            with pytest.raises(error):
                call()
            assert (stream.token_ids, stream.held_text, stream.cleared_chars) == before
    with pytest.raises(StreamClosed):
        stream.append_text("ld")


def test_no_room_changes_nothing(checkpoints: Callable[..., Path], tokenizer: Tokenizer) -> None:
    limits = {"kv_cache_bytes": 2**22, "max_model_len": 256, "max_pending_tokens": 40}
    with Engine.from_pretrained(checkpoints(), **limits) as small, small.open(messages=[USER]) as stream:
        small.run()
        stream.append_text("Hello")
        with small.open(token_ids=[1] * 30), pytest.raises(Overloaded):
            stream.append_text(" a" * 20)
        assert stream.held_text == "Hello"
        stream.append_text(" world", is_final=True)
        small.run()
        assert reply_ids(stream) == [*tokenizer.encode_text("Hello world"), END]


def test_without_a_tokenizer(tiny: Path) -> None:
    with Engine.from_pretrained(tiny, kv_cache_bytes=2**20, max_model_len=64) as engine:
        stream = engine.open(token_ids=[1, 2])
        for call in (lambda: stream.append_text("x"), stream.finish_text):
            with pytest.raises(ConfigError, match=r"no tokenizer\.json.*add Qwen3's"):
                call()
