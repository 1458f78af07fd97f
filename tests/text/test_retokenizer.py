"""Retokenizer: text in pieces gives the ids of the whole text, each only once nothing can change it any more."""

from __future__ import annotations

import json
import random
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from guardengine.errors import CheckpointError, InvalidText
from guardengine.text import vocabulary
from guardengine.text.retokenizer import _PRE_TOKENS, MAX_HELD, Retokenizer
from guardengine.text.spans import HeldText, Offsets
from guardengine.text.tokenizer import Tokenizer
from guardengine.text.unicode_rules import CharClasses, is_plain, starts_unit

FRAGMENTS = (
    *(
        "Hello",
        " world",
        "I'll",
        "DON'T",
        "3.14159",
        "x_y+=1;",
        "\tif (a<b) {\r\n",
        "//",
        "...",
        "#!",
        "'",
        "'r",
    ),
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u3000",
        "\u200b",
        "\u2028",
        "\x00",
        "\x7f",
        "!",
        "!!\n",
    ),
    *(
        "Привет",
        "你好，世界",
        "预测股票市场",
        "안녕",
        "שלום",
        "مرحبا",
        "नमस्ते",
        "ไทย",
        "ប",
        "𝔘𝔫𝔦",
        "日本語です",
    ),
    *("№²½", "é", "e\u0301", "\u1f82", "α\u0313\u0300\u0345", "\u212b", "a\u0323\u0307", "\u0301"),
    *(
        "\u1112\u1161\u11ab",
        "👩‍👩‍👧‍👦",
        "🇩🇪",
        "🏽",
        "\ufffd",
        "e",
        "l",
        "s",
        "T",
        "ſ",
        "か",
        "\u3099",
        "=",
        "<",
    ),
    *("\u0338", "5", "\u0316", "\u0344", "\u0f73", "\u09c7", "\u09be", "\U00016d67", "\U000113c9", "\u0378"),
    *("<|im_end|>", "<|im_", "end|>"),
)
ANY_TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join)
CUTS = st.lists(st.integers(0, 150), max_size=12) | st.just(list(range(1, 300)))
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    assert vocabulary.write_tokenizer_files(folder, 8192), (
        "install the dev dependencies: dashscope is missing"
    )
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def retokenizer(tokenizer: Tokenizer) -> Retokenizer:
    return Retokenizer(tokenizer)


def pieces(data: str | bytes, cuts: list[int]) -> list[str | bytes]:
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


def feed(
    retokenizer: Retokenizer, parts: list[str | bytes], whole: list[int] | None = None
) -> tuple[list[int], list[Offsets], HeldText]:
    """All ids and spans; checks after each part that the ids so far are the first of `whole`."""
    held, ids, spans = HeldText(), [], []
    for part, is_final in (*((part, False) for part in parts), ("", True)):
        more, more_spans, held = retokenizer.feed(held, part, is_final=is_final)
        ids, spans = ids + more, spans + more_spans
        assert whole is None or ids == whole[: len(ids)]
        assert len(held.text) <= retokenizer._max_held
    assert held.is_empty
    return ids, spans, held


# -- ids ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@quick
@given(text=ANY_TEXT, cuts=CUTS)
@example(text="".join(FRAGMENTS), cuts=list(range(1, 1000)))
@example(text="hello\u0338\u0301", cuts=[6])  # the accent passes the stroke and composes with the o
@example(text="'t\u0323x", cuts=[2])  # no contraction after all
@example(text="你e\u0301", cuts=[2])
def test_ids_are_those_of_the_whole_text(
    tokenizer: Tokenizer, retokenizer: Retokenizer, text: str, cuts: list[int]
) -> None:
    whole = tokenizer.encode_text(text)
    for data in (text, text.encode()):
        ids, _, held = feed(retokenizer, pieces(data, cuts), whole)
        assert ids == whole
        assert (held.num_chars, held.num_bytes) == (len(text), len(text.encode()))


@quick
@given(text=ANY_TEXT, continuations=st.lists(ANY_TEXT, min_size=3, max_size=3))
def test_no_continuation_changes_what_was_fed(
    tokenizer: Tokenizer, retokenizer: Retokenizer, text: str, continuations: list[str]
) -> None:
    ids = retokenizer.feed(HeldText(), text).token_ids
    for more in (*continuations, "\u0301", "e", "'s", "\n", " ", "好"):
        assert tokenizer.encode_text(text + more)[: len(ids)] == ids


def test_every_cut_of_prose_and_code(tokenizer: Tokenizer, retokenizer: Retokenizer) -> None:
    text = Path(__file__).read_text()[:6000]
    whole = tokenizer.encode_text(text)
    rng = random.Random(0)
    for size in (1, 2, 7, 20):
        assert feed(retokenizer, pieces(text, list(range(0, len(text), size))), whole)[0] == whole
        cuts = [rng.randrange(len(text)) for _ in range(len(text) // size)]
        assert feed(retokenizer, pieces(text.encode(), cuts), whole)[0] == whole


@quick
@given(
    text=st.lists(st.sampled_from(("<|im_start|>", "<|im_end|>", "<think>", "x", " ")), max_size=8).map(
        "".join
    ),
    cuts=CUTS,
)
def test_special_tokens_stay_text(retokenizer: Retokenizer, text: str, cuts: list[int]) -> None:
    assert all(token_id < 151_643 for token_id in feed(retokenizer, pieces(text, cuts))[0])


# -- how much is held --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("", ""),
        ("Hello", "Hello"),
        ("Hello wor", " wor"),
        ("Hello world.", "."),
        ("in 1984", ""),  # digits are tokens each, and nothing composes with them
        ("don't", "'t"),  # it may still become a letter with a mark
        ("a \n ", " \n "),
        ("x\n\n  if", " if"),
        ("cafe\u0301", "cafe\u0301"),
        ("人工智能的发展正在改变", "改变"),
        ("你e", "你e"),  # é, after which no token might have been cut
    ],
)
def test_what_is_held(retokenizer: Retokenizer, text: str, held: str) -> None:
    assert retokenizer.feed(HeldText(), text).held.text == held


@pytest.mark.parametrize("text", ["{\n\t\t}", "a\t\t!", "½  ½", "x\u3000\u3000½", "x \t٣", "a\u2028\u2028?"])
def test_white_space_before_what_takes_none(tokenizer: Tokenizer, text: str) -> None:
    """Its last character is a pre-token of its own, also where it is learnt together with what comes before it."""
    retokenizer = Retokenizer(tokenizer)
    for same in (text, *text, text):
        assert feed(retokenizer, [same])[0] == tokenizer.encode_text(same)


def test_bytes_wait_for_the_character(retokenizer: Retokenizer) -> None:
    data = "价𝔘".encode()
    held = retokenizer.feed(HeldText(), data[:2]).held
    assert (held.text, held.partial) == ("", data[:2])
    held = retokenizer.feed(held, "").held  # an empty piece changes nothing
    held = retokenizer.feed(held, data[2:5]).held
    assert (held.text, held.partial) == ("价", data[3:5])
    assert feed(retokenizer, [data])[0] == retokenizer.feed(held, data[5:], is_final=True).token_ids


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([b"a\xffb"], "a\ufffdb"),
        ([b"a\xe4\xbd", b"b"], "a\ufffdb"),
        ([b"a\xe4\xbd", "b"], "a\ufffdb"),
        ([b"a\xf0\x9d"], "a\ufffd"),
        ([b"\xc0", b"\xaf", b"\xed\xa0\x80"], "\ufffd" * 5),
        ([bytearray(b"a"), memoryview(b"b")], "ab"),
    ],
)
def test_bytes_that_are_not_utf_8_are_replaced(
    tokenizer: Tokenizer, retokenizer: Retokenizer, parts: list[str | bytes], text: str
) -> None:
    ids, _, held = feed(retokenizer, parts)
    assert ids == tokenizer.encode_text(text)
    assert held.num_chars == len(text)


@pytest.mark.parametrize("bad", [None, 3, ["a"], "\ud83d", "a\udc00"])
def test_what_is_no_text_is_refused(retokenizer: Retokenizer, bad: str) -> None:
    with pytest.raises(InvalidText):
        retokenizer.feed(HeldText("abc"), bad)


# -- the bound ---------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=ANY_TEXT, cuts=CUTS, max_held=st.sampled_from((1, 2, 3, 5, 8)))
def test_beyond_the_bound_ids_do_not_depend_on_the_pieces(
    tokenizer: Tokenizer, retokenizer: Retokenizer, text: str, cuts: list[int], max_held: int
) -> None:
    bounded = Retokenizer.__new__(Retokenizer)
    bounded.__dict__.update(retokenizer.__dict__)
    bounded._max_held = max_held
    expected = feed(bounded, [text])[:2]
    assert feed(bounded, pieces(text, cuts))[:2] == expected
    assert feed(bounded, list(text))[:2] == expected
    # Nothing is lost, but a mark may be separated from its letter.
    assert tokenizer.normalize(tokenizer.decode(expected[0])) == tokenizer.normalize(text)


def test_up_to_the_bound_ids_are_exact(tokenizer: Tokenizer, retokenizer: Retokenizer) -> None:
    rng = random.Random(1)
    for unit in ("a", "ab", "=", " ", "\n", "xyzzy", "!?", "😀", "e\u0301"):
        text = "x " + (unit * MAX_HELD)[: MAX_HELD - 4] + " y"
        cuts = [rng.randrange(len(text)) for _ in range(30)]
        assert feed(retokenizer, pieces(text, cuts))[0] == tokenizer.encode_text(text), unit


def test_time_grows_with_the_length(retokenizer: Retokenizer) -> None:
    """A word of 300,000 letters in big pieces, and of 5,000 one by one."""
    word = "".join(random.Random(2).choices("abcdefgh", k=300_000))
    start = time.perf_counter()
    num_chars = feed(retokenizer, pieces(word, list(range(0, len(word), 50_000))))[2].num_chars
    feed(retokenizer, list(word[:5_000]))
    feed(retokenizer, list("\u0301" * 5_000))
    assert num_chars == len(word)
    assert time.perf_counter() - start < 20


# -- spans -------------------------------------------------------------------------------------------------


@quick
@given(text=ANY_TEXT, cuts=CUTS)
def test_spans_cover_the_text(
    tokenizer: Tokenizer, retokenizer: Retokenizer, text: str, cuts: list[int]
) -> None:
    ids, spans, _ = feed(retokenizer, pieces(text, cuts))
    assert (ids, spans) == feed(retokenizer, [text])[:2]
    assert len(spans) == len(ids)
    reached = 0
    for token_id, (start, end, start_byte, end_byte) in zip(ids, spans, strict=True):
        assert start <= reached < end or (start < end == reached)
        reached = max(reached, end)
        assert (start_byte, end_byte) == (len(text[:start].encode()), len(text[:end].encode()))
        whole = unicodedata.normalize("NFC", text[start:end])
        assert is_unknown(text) or tokenizer.decode([token_id]).strip("\ufffd") in whole
    assert reached == len(text)


def is_unknown(text: str) -> bool:
    return any(unicodedata.category(char) == "Cn" for char in text)


def test_spans_of_parts_and_compositions(retokenizer: Retokenizer) -> None:
    ids, spans, _ = feed(retokenizer, ["a𝔘b"])
    assert len(ids) == 4
    assert spans == [(0, 1, 0, 1), (1, 2, 1, 5), (1, 2, 1, 5), (2, 3, 5, 6)]
    assert feed(retokenizer, ["cafe", "\u0301!"])[1] == [(0, 2, 0, 2), (2, 5, 2, 6), (5, 6, 6, 7)]


# -- what is assumed of characters -------------------------------------------------------------------------


@pytest.mark.slow
def test_classes_split_as_the_library_does(tokenizer: Tokenizer) -> None:
    classes = CharClasses(tokenizer.split)
    for first in (
        *range(0, 0x3100, 64),
        *range(0x3100, 0x30000, 0x1040),
        0xD7C0,
        0xFB00,
        0xFF00,
        0xE0100,
        0x10FFC0,
    ):
        chars = [chr(code) for code in range(first, first + 64) if not 0xD800 <= code < 0xE000]
        text = "".join(f"1{c}{c}a'{c}x'r{c}'l{c}!{c}\n" for c in chars)
        expected = [end for _, (_, end) in tokenizer.split(text)]
        assert [match.end() for match in _PRE_TOKENS.finditer(text.translate(classes))] == expected, hex(
            first
        )


def test_composing_keeps_the_class(tokenizer: Tokenizer) -> None:
    classes = CharClasses(tokenizer.split)
    for code in range(0x20000):
        rule = unicodedata.decomposition(chr(code))
        if " " in rule and rule[0] != "<" and tokenizer.normalize(chr(code)) == chr(code):
            before, after = classes[int(rule.split()[0], 16)], classes[code]
            assert before == after or (before in "srel" and after == "L"), hex(code)


def test_units_are_normalized_each_by_itself(tokenizer: Tokenizer) -> None:
    firsts = ("a", "か", "\u1100", "가", "\u09c7", "=", "\U00011099", "\u0301", "\u0f71", "5")
    for code in (
        *range(0x300, 0x3100),
        *range(0xA800, 0xAC00),
        *range(0x11000, 0x12000),
        *range(0x16D00, 0x16E00),
    ):
        for first in firsts:
            text = first + chr(code)
            if starts_unit(text, 1):
                assert tokenizer.normalize(text) == tokenizer.normalize(first) + tokenizer.normalize(
                    chr(code)
                )
    assert not is_plain("e\u0301")
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000 and is_plain(char := chr(code)):
            assert unicodedata.normalize("NFD", char)[1:] == "" or unicodedata.is_normalized("NFC", char)
            assert code < 0x300 or starts_unit("a" + char, 1)


def test_memory_of_characters_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guardengine.text.unicode_rules._MAX_KNOWN", 300)
    classes = CharClasses(tokenizer.split)
    assert "".join(map(chr, range(0x250))).translate(classes)[0x41:0x43] == "LL"
    assert len(classes) <= 300
    assert " '\r\n".translate(classes) == " 'nn"


def test_another_way_to_split_is_refused(tmp_path: Path) -> None:
    raw = vocabulary.tokenizer_json({bytes([byte]): byte for byte in range(256)})
    raw["normalizer"] = {"type": "NFKC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="another normalizer or pre_tokenizer"):
        Retokenizer(Tokenizer.from_dir(tmp_path))
