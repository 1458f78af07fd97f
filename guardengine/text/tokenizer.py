"""Tokenizer: text to Qwen3 token ids, where text is always only text.

Reads a checkpoint's tokenizer.json and keeps its added tokens (<|im_end|>, <think>, ...) out of the encoder: text that
spells one is encoded as ordinary bytes. Which added tokens a conversation has is decided by the chat template, see
chat_template.py. Knows no messages and no roles.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from guardengine.errors import CheckpointError, InvalidText, InvalidTokens, StreamTooLong

_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}
NORMALIZER: dict[str, Any] = {"type": "NFC"}
PRE_TOKENIZER: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": _SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL,
    ],
}


def byte_letters() -> list[str]:
    """The printable character that byte-level BPE files write for each byte (the table of GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_MEND = "copy the tokenizer.json of the released Qwen3Guard checkpoint into the folder"
# Options of the BPE model beside its vocabulary and merges; `dropout` is refused.
_BPE_OPTIONS = (
    *("unk_token", "continuing_subword_prefix", "end_of_word_suffix"),
    *("fuse_unk", "byte_fallback", "ignore_merges"),
)
# NFC makes at most this many code points into one (a base letter with three marks).
_NFC_SHRINKS_BY = 4


class Tokenizer:
    """Encodes text as plain byte-level BPE, and decodes any ids. Made by `from_dir`; immutable.

    Attributes:
        added_tokens: Text -> id of every added token. Encoding never yields one of these ids.
        control_ids: The added tokens that the file marks as special (Qwen3: 151643 to 151656).
        vocab_size: The largest id, plus one.
    """

    def __init__(
        self,
        bpe: tokenizers.Tokenizer,
        vocabulary: dict[str, int],
        added_tokens: dict[str, int],
        control_ids: frozenset[int],
    ) -> None:
        self._bpe = bpe
        self.added_tokens = added_tokens
        self.control_ids = control_ids
        self._added_text = {token_id: text for text, token_id in added_tokens.items()}
        self._base_ids = frozenset(vocabulary.values())
        self.vocab_size = max(max(self._base_ids), *added_tokens.values()) + 1
        self._longest_token = max(map(len, vocabulary))
        self._letters = "\n".join(vocabulary)  # one string, because a dict of them is ten times as large

    @staticmethod
    def from_dir(path: Path) -> Tokenizer:
        """Read `path`/tokenizer.json. Raises CheckpointError naming the file, what is wrong and what to do."""
        file = Path(path) / "tokenizer.json"
        try:
            raw = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise CheckpointError(f"{file}: no such file; {_MEND}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: cannot be read as JSON ({error}); {_MEND}") from None
        added_tokens, control_ids = _read_added_tokens(raw, file)
        _check_model(raw, added_tokens, file)
        try:
            bpe = _build(raw)
        except Exception as error:  # the library raises plain Exception for every fault of the file
            raise CheckpointError(f"{file}: refused by the tokenizers library ({error}); {_MEND}") from None
        return Tokenizer(bpe, raw["model"]["vocab"], added_tokens, control_ids)

    def encode_text(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """Encode plain text. Added tokens that it spells become ordinary tokens.

        Args:
            text: Any text.
            max_tokens: Refuse early, before any work, text that cannot possibly fit. Text that is a little longer may
                still be encoded: check the length of the result.

        Raises:
            InvalidText: It is not a str, or has lone surrogates.
            StreamTooLong: It cannot fit into max_tokens.
        """
        self._check(text, max_tokens)
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids

    def encode_with_ends(self, text: str, *, max_tokens: int | None = None) -> tuple[list[int], list[int]]:
        """Encode plain text, and find where tokens end.

        Args:
            text: Any text.
            max_tokens: See `encode_text`.

        Returns:
            The ids, and for each the index in `text` just past its last character. Of letters that NFC composes the
                first counts: "e\\u0301" ends at 1.

        Raises:
            InvalidText: It is not a str, or has lone surrogates.
            StreamTooLong: It cannot fit into max_tokens.
        """
        self._check(text, max_tokens)
        encoding = self._bpe.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode plain text that is valid and in NFC. Returns the ids, and for each the range of the characters of
        which it has a byte."""
        encoding = self._bpe.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def normalize(self, text: str) -> str:
        """The normal form (NFC) of a text, which is what `encode_text` encodes."""
        normal: str = self._bpe.normalizer.normalize_str(text)
        return normal

    def split(self, text: str) -> list[tuple[str, tuple[int, int]]]:
        """The pre-tokens of normalized text, which are encoded independently, with their places."""
        pieces: list[tuple[str, tuple[int, int]]] = self._bpe.pre_tokenizer.pre_tokenize_str(text)
        return pieces

    @property
    def splits_as_qwen3(self) -> bool:
        """Whether text is normalized and split in the same way as in Qwen3's released file."""
        rules = (self._bpe.normalizer, self._bpe.pre_tokenizer)
        return None not in rules and [json.loads(rule.__getstate__()) for rule in rules] == [
            NORMALIZER,
            PRE_TOKENIZER,
        ]

    @property
    def vocabulary(self) -> Iterator[bytes]:
        """The bytes of every token into which text can be encoded."""
        table = {ord(letter): byte for byte, letter in enumerate(byte_letters())} | {ord("\n"): 0x100}
        for token in self._letters.translate(table).split("\u0100"):
            yield token.encode("latin-1")

    def check_fits(self, num_chars: int, max_tokens: int) -> None:
        """Raise StreamTooLong when a text of so many characters cannot possibly fit into `max_tokens`."""
        if num_chars > max_tokens * self._longest_token * _NFC_SHRINKS_BY:
            raise StreamTooLong(
                f"text of {num_chars} characters cannot fit into {max_tokens} tokens; shorten it, or split the "
                "conversation"
            )

    def _check(self, text: str, max_tokens: int | None) -> None:
        self.check_text(text)
        if max_tokens is not None:
            self.check_fits(len(text), max_tokens)

    def check_text(self, text: str) -> None:
        """Raise InvalidText, with the place, for a value that is not a str of valid Unicode."""
        if not isinstance(text, str):
            raise InvalidText(f"text is {type(text).__name__}, not str; decode bytes as UTF-8 first")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidText(
                f"text has a lone surrogate ({text[error.start]!r}) at character {error.start}, so it is not valid "
                "Unicode; replace it, e.g. text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
            ) from None

    def decode_text(self, ids: Iterable[int]) -> str:
        """The text of ids that a model generated, without control tokens and without ids that the vocabulary does not
        have, like transformers with skip_special_tokens."""
        return self.decode(
            token_id
            for token_id in ids
            if token_id not in self.control_ids
            and (token_id in self._base_ids or token_id in self._added_text)
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of any ids. Added tokens are written out; bytes that are not UTF-8 become U+FFFD. Raises
        InvalidTokens for ids that the vocabulary does not have."""
        pieces: list[str] = []
        run: list[int] = []
        for index, token_id in enumerate(ids):
            if token_id in self._base_ids:
                run.append(token_id)
            elif token_id in self._added_text:
                pieces += [self._bpe.decode(run, skip_special_tokens=False), self._added_text[token_id]]
                run = []
            else:
                raise InvalidTokens(
                    f"token id {token_id!r} at index {index} is not in the vocabulary of {self.vocab_size} ids; "
                    "decode only ids of this tokenizer"
                )
        return "".join([*pieces, self._bpe.decode(run, skip_special_tokens=False)])


def _build(raw: dict[str, Any]) -> tokenizers.Tokenizer:
    """The encoder for a checked file. Raises whatever the library raises."""
    model = raw["model"]
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    options = {name: model[name] for name in _BPE_OPTIONS if model.get(name) is not None}
    # Offsets must be exact, lengths whole: nothing but normalizer, pre-tokenizer and model may act on text. The model
    # goes in as it was checked: writing and reading it as JSON once more took as long as loading all weights.
    rest = raw | {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
    rest["model"] = {"type": "BPE", "vocab": {}, "merges": []}
    bpe = tokenizers.Tokenizer.from_str(json.dumps(rest))
    bpe.model = tokenizers.models.BPE(vocab=model["vocab"], merges=pairs, **options)
    return bpe


def _read_added_tokens(raw: Any, file: Path) -> tuple[dict[str, int], frozenset[int]]:
    entries = raw.get("added_tokens") if isinstance(raw, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{file}: `added_tokens` is not a list of objects; {_MEND}")
    added_tokens: dict[str, int] = {}
    control_ids = set()
    for entry in entries:
        text, token_id = entry.get("content"), entry.get("id")
        if (
            not isinstance(text, str)
            or not text
            or isinstance(token_id, bool)
            or not isinstance(token_id, int)
        ):
            raise CheckpointError(f"{file}: added token {entry!r} has no text or no id; {_MEND}")
        if text in added_tokens or token_id in added_tokens.values():
            raise CheckpointError(f"{file}: added token {text!r} (id {token_id}) is listed twice; {_MEND}")
        for flag in ("single_word", "lstrip", "rstrip"):
            if entry.get(flag):
                raise CheckpointError(
                    f"{file}: added token {text!r} has {flag}=true, which Qwen3 does not use; {_MEND}"
                )
        added_tokens[text] = token_id
        if entry.get("special"):
            control_ids.add(token_id)
    for text in ("<|im_start|>", "<|im_end|>"):
        if text not in added_tokens:
            raise CheckpointError(f"{file}: `added_tokens` has no {text!r}; {_MEND}")
    return added_tokens, frozenset(control_ids)


def _check_model(raw: dict[str, Any], added_tokens: dict[str, int], file: Path) -> None:
    model = raw.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(vocab, dict):
        raise CheckpointError(f"{file}: `model` is not a BPE model with a vocabulary; {_MEND}")
    if model.get("dropout"):
        raise CheckpointError(
            f"{file}: `model.dropout` is {model['dropout']!r}: encoding would be random; {_MEND}"
        )
    for text in vocab.keys() & added_tokens.keys():
        # Ordinary text could otherwise be merged into the special id.
        raise CheckpointError(f"{file}: added token {text!r} is in `model.vocab` too; {_MEND}")
    clash = set(vocab.values()) & set(added_tokens.values())
    if clash:
        raise CheckpointError(f"{file}: id {min(clash)} is an added token and in `model.vocab` too; {_MEND}")
    missing = 256 - sum(len(token) == 1 for token in vocab)
    if missing > 0:
        raise CheckpointError(
            f"{file}: {missing} of the 256 byte letters are missing from `model.vocab`, so some text could not be "
            f"encoded; {_MEND}"
        )
