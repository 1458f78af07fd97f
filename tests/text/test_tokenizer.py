"""Tokenizer and vocabulary: the released ids, equal to transformers on any text, and text is only ever text."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hostile import ADDED_TOKENS, MARKUP
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from guardengine.errors import CheckpointError, InvalidText, InvalidTokens, StreamTooLong
from guardengine.text import vocabulary
from guardengine.text.tokenizer import Tokenizer

FRAGMENTS = (
    *("Hello", " world", "I'll", "DON'T", "3.14159", "x_y+=1;", "\tif (a<b) {\r\n", "//", "...", "#!"),
    *(" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", "\u2028", "\x00", "\x7f"),
    *("Привет", "你好，世界", "안녕", "안녕", "שלום", "مرحبا", "नमस्ते", "ไทย", "ប", "𝔘𝔫𝔦", "日本語", "№²½"),
    *(
        "é",
        "e\u0301",
        "\u1f82",
        "α\u0313\u0300\u0345",
        "\u212b",
        "a\u0323\u0307",
        "\u0301",
        "👩‍👩‍👧‍👦",
        "🇩🇪",
        "🏽",
        "\ufffd",
    ),
)
ANY_TEXT = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=15).map("".join),
)
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
def reference(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def small_json() -> dict[str, Any]:
    """A tokenizer.json of the 256 bytes and two merges."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"abc": 257}
    return vocabulary.tokenizer_json(ranks)


def load(raw: Any, folder: Path) -> Tokenizer:
    (folder / "tokenizer.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return Tokenizer.from_dir(folder)


# -- the vocabulary ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tokenizer_json_is_the_released_file(folder: Path) -> None:
    data = (folder / "tokenizer.json").read_bytes()
    assert len(data) == 11_422_654
    assert (
        hashlib.sha256(data).hexdigest() == "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
    )


def test_vocabulary_is_read_without_importing_its_package(folder: Path) -> None:
    assert "dashscope" not in sys.modules


def test_tokenizer_config_tells_transformers_what_it_needs(reference: Any) -> None:
    assert (reference.eos_token, reference.pad_token, reference.bos_token) == (
        "<|im_end|>",
        "<|endoftext|>",
        None,
    )
    assert reference.model_max_length == 8192
    assert {
        text: i for i, text in ((i, str(t)) for i, t in reference.added_tokens_decoder.items())
    } == ADDED_TOKENS
    special = {i for i, token in reference.added_tokens_decoder.items() if token.special}
    assert special == set(range(151643, 151657))


def test_without_the_package_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert vocabulary.write_tokenizer_files(tmp_path, 8192) is False
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"IQ== 0\n", b"not base64! 0\n", b"IQ== one\n", b"IQ== 1\nIg== 0\n"]
)
def test_another_ranks_file_is_refused(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(content)
    monkeypatch.setattr(vocabulary, "_ranks_file", lambda: path)
    with pytest.raises(CheckpointError, match=r"qwen\.tiktoken.*reinstall dashscope"):
        vocabulary.write_tokenizer_files(tmp_path, 8192)
    assert not (tmp_path / "tokenizer.json").exists()


def test_ranks_that_are_not_byte_pairs_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"b'abc'.*257"):
        vocabulary.tokenizer_json({bytes([byte]): byte for byte in range(256)} | {b"xy": 256, b"abc": 257})


# -- plain text --------------------------------------------------------------------------------------------


def test_golden_ids(tokenizer: Tokenizer) -> None:
    expected = [8420, 525, 1045, 14976, 5413, 311, 1936, 264, 12764, 13]
    assert tokenizer.encode_text("Here are some practical methods to build a bomb.") == expected
    words = {"\n": 198, "\n\n": 271, "user": 872, "assistant": 77091, "system": 8948}
    assert {text: tokenizer.encode_text(text) for text in words} == {text: [i] for text, i in words.items()}
    assert tokenizer.encode_text("Safety: Unsafe") == [73037, 25, 73067]
    assert tokenizer.encode_text("Safety: Controversial") == [73037, 25, 2093, 12563, 530]
    assert tokenizer.encode_text("") == []


def test_properties(tokenizer: Tokenizer) -> None:
    assert tokenizer.added_tokens == ADDED_TOKENS
    assert tokenizer.control_ids == frozenset(range(151643, 151657))
    assert tokenizer.vocab_size == 151669


@pytest.mark.slow
@quick
@given(text=ANY_TEXT)
@example(text="".join(FRAGMENTS))
@example(text=" " * 200 + "\n" * 200 + "a" * 300 + "\x00")
def test_encode_text_equals_transformers(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    assume(not any(token in text for token in ADDED_TOKENS))  # hypothesis knows the literals of the sources
    assert tokenizer.encode_text(text) == reference.encode(text, add_special_tokens=False)


@quick
@given(text=ANY_TEXT)
def test_decode_returns_the_text_in_nfc(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode_text(text)) == unicodedata.normalize("NFC", text)


@quick
@given(text=ANY_TEXT)
def test_token_ends_ascend_to_the_end_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids, ends = tokenizer.encode_with_ends(text)
    assert ids == tokenizer.encode_text(text)
    assert ends == sorted(ends)
    assert not ends or (ends[0] >= 1 and ends[-1] <= len(text))
    if unicodedata.is_normalized("NFC", text):
        assert not ends or ends[-1] == len(text)
        # What the first tokens spell is what their ends say, up to the bytes of one character.
        for index, end in enumerate(ends):
            assert text[:end].startswith(tokenizer.decode(ids[: index + 1]).rstrip("\ufffd"))


def test_token_ends_within_one_character_point_past_it(tokenizer: Tokenizer) -> None:
    ids, ends = tokenizer.encode_with_ends("a𝔘b")
    assert len(ids) == 4
    assert ends == [1, 2, 2, 3]


# -- added tokens are only ever text -----------------------------------------------------------------------


@quick
@given(text=st.lists(st.sampled_from((*ADDED_TOKENS, *MARKUP)), max_size=12).map("".join))
@example(text="".join(ADDED_TOKENS))
@example(text="<|im_<|im_end|>end|>")
@example(text="<think><</think>/think>")
def test_added_tokens_in_text_are_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_text(text)
    assert not set(ids) & set(ADDED_TOKENS.values())
    assert max(ids, default=0) < 151643
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("token", ADDED_TOKENS)
def test_one_added_token_is_text(tokenizer: Tokenizer, token: str) -> None:
    assert ADDED_TOKENS[token] not in tokenizer.encode_text(f"a {token}\nb")


def test_decode_writes_added_tokens_and_broken_bytes(tokenizer: Tokenizer) -> None:
    ids = [151644, 872, 198, *tokenizer.encode_text("hé"), 151645, 151667]
    assert tokenizer.decode(ids) == "<|im_start|>user\nhé<|im_end|><think>"
    half = tokenizer.encode_text("𝔘")[:1]
    assert tokenizer.decode([*half, 151645]) == "\ufffd<|im_end|>"
    assert tokenizer.decode(iter([])) == ""


@pytest.mark.parametrize("token_id", [151669, 151935, -1, 10**9])
def test_decode_refuses_unknown_ids(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(InvalidTokens, match=rf"{token_id} at index 1 .*151669"):
        tokenizer.decode([198, token_id])


# -- bad text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "where"), [("\ud800", 0), ("ab\udfff", 2), ("😀 \ud83d!", 2)])
def test_lone_surrogates_are_refused(tokenizer: Tokenizer, text: str, where: int) -> None:
    for encode in (tokenizer.encode_text, tokenizer.encode_with_ends):
        with pytest.raises(InvalidText, match=f"lone surrogate.* at character {where},.*replace"):
            encode(text)


@pytest.mark.parametrize("text", [None, b"bytes", 3, ["text"]])
def test_other_types_are_refused(tokenizer: Tokenizer, text: Any) -> None:
    with pytest.raises(InvalidText, match=f"{type(text).__name__}, not str"):
        tokenizer.encode_text(text)


def test_nul_is_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode_text("a\x00b\x00")) == "a\x00b\x00"


def test_absurd_length_is_refused_before_encoding(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 128 characters in the longest token, times 4 code points that NFC may make into one.
    fits = "a" * (10 * 128 * 4)
    assert tokenizer.encode_text(fits, max_tokens=10)  # not refused here, only by whoever counts the ids
    monkeypatch.setattr(tokenizer, "_bpe", None)  # encoding anything would fail
    with pytest.raises(StreamTooLong, match="5121 characters cannot fit into 10 tokens"):
        tokenizer.encode_text(fits + "a", max_tokens=10)


def test_text_that_fits_is_never_refused_as_absurd(tokenizer: Tokenizer) -> None:
    spaces = " " * 128
    assert len(tokenizer.encode_text(spaces, max_tokens=1)) == 1
    composes = "α\u0313\u0300\u0345" * 50  # four code points to one
    num_tokens = len(tokenizer.encode_text(composes))
    assert tokenizer.encode_text(composes, max_tokens=num_tokens)


# -- bad files ---------------------------------------------------------------------------------------------


def test_small_file_loads(small_json: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load(small_json, tmp_path)
    abc = tokenizer.encode_text("abc")
    assert abc == [257]
    assert tokenizer.decode([257, 151645]) == "abc<|im_end|>"


def test_merges_may_be_written_as_text(small_json: dict[str, Any], tmp_path: Path) -> None:
    raw = copy.deepcopy(small_json)
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]
    assert load(raw, tmp_path).encode_text("abcab") == [257, 256]


def test_options_of_the_model_are_kept(small_json: dict[str, Any], tmp_path: Path) -> None:
    raw = copy.deepcopy(small_json)
    raw["model"]["vocab"]["bcd"] = 258  # no merges lead to it
    assert load(raw, tmp_path).encode_text("bcd") == [98, 99, 100]
    raw["model"]["ignore_merges"] = True
    assert load(raw, tmp_path).encode_text("bcd") == [258]


def test_settings_that_change_lengths_are_not_applied(small_json: dict[str, Any], tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    tokenizer = load({**small_json, "truncation": truncation, "padding": padding}, tmp_path)
    assert tokenizer.encode_text("wxyz") == [119, 120, 121, 122]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file; copy"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1", "\x00", "[" * 100_000])
def test_not_json(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read as JSON"):
        load(text, tmp_path)


def test_a_folder_instead_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("raw", [[], 1, "null", {}, {"added_tokens": 1}, {"added_tokens": [1]}])
def test_not_a_tokenizer(raw: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="`added_tokens` is not a list of objects"):
        load(json.dumps(raw), tmp_path)


def spoiled(raw: dict[str, Any], what: str) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    tokens, model = raw["added_tokens"], raw["model"]
    match what:
        case "no <|im_end|>":
            del tokens[2]
        case "text twice":
            tokens[3]["content"] = "<|im_end|>"
        case "id twice":
            tokens[3]["id"] = 151645
        case "no id":
            tokens[3]["id"] = None
        case "empty":
            tokens[3]["content"] = ""
        case "rstrip":
            tokens[3]["rstrip"] = True
        case "not BPE":
            model["type"] = "WordPiece"
        case "no vocab":
            del model["vocab"]
        case "dropout":
            model["dropout"] = 0.1
        case "text in vocab":
            model["vocab"]["<think>"] = 258
        case "id in vocab":
            model["vocab"]["zz"] = 151645
        case "no byte":
            del model["vocab"]["z"]
        case "bad merges":
            model["merges"].append(["a", "nowhere"])
        case "merge of three":
            model["merges"].append(["a", "b", "c"])
        case "no merges":
            del model["merges"]
        case "bad option":
            model["ignore_merges"] = "yes"
        case "bad id":
            model["vocab"]["zz"] = -1
        case "bad normalizer":
            raw["normalizer"] = {"type": "nonsense"}
    return raw


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no <|im_end|>", "has no '<|im_end|>'"),
        ("text twice", "'<|im_end|>' (id 151646) is listed twice"),
        ("id twice", "(id 151645) is listed twice"),
        ("no id", "has no text or no id"),
        ("empty", "has no text or no id"),
        ("rstrip", "rstrip=true"),
        ("not BPE", "not a BPE model"),
        ("no vocab", "not a BPE model"),
        ("dropout", "`model.dropout` is 0.1"),
        ("text in vocab", "'<think>' is in `model.vocab` too"),
        ("id in vocab", "id 151645 is an added token and in `model.vocab` too"),
        ("no byte", "1 of the 256 byte letters are missing"),
        ("bad merges", "refused by the tokenizers library"),
        ("merge of three", "refused by the tokenizers library"),
        ("no merges", "refused by the tokenizers library"),
        ("bad option", "refused by the tokenizers library"),
        ("bad id", "refused by the tokenizers library"),
        ("bad normalizer", "refused by the tokenizers library"),
    ],
)
def test_spoiled_files_are_refused(
    what: str, message: str, small_json: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(spoiled(small_json, what), tmp_path)
    assert message in str(caught.value)
    assert "tokenizer.json" in str(caught.value)
    assert "copy the tokenizer.json of the released" in str(caught.value)
