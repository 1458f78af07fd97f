"""Write Qwen3's tokenizer files from the public byte-pair ranks that the package `dashscope` on PyPI contains.

For checkpoints with random weights, which come without a tokenizer. The ranks file of the installed package is read
without importing the package; tokenizer.json and tokenizer_config.json are written like those of the released models.
Nothing is downloaded, and only the last tokenizer.json is cached.
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
import json
import logging
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from guardengine.errors import CheckpointError
from guardengine.text.special_tokens import SHIPPED
from guardengine.text.tokenizer import BYTE_LEVEL, NORMALIZER, PRE_TOKENIZER, byte_letters

logger = logging.getLogger("guardengine")

NUM_RANKS = 151_643  # ranks 0..151642 are the byte-level tokens; added tokens follow
_CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Added tokens that the released file does not mark as special: `skip_special_tokens` keeps them.
_MARKUP_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)


def write_tokenizer_files(
    directory: Path, model_max_length: int, kind: Literal["stream", "gen"] = "stream"
) -> bool:
    """Write tokenizer.json and tokenizer_config.json. Takes a few seconds the first time.

    Args:
        directory: The checkpoint's folder.
        model_max_length: The longest context, in tokens.
        kind: "stream" or "gen"; decides the chat template.

    Returns:
        False, with nothing written, when the package with the ranks is not installed.

    Raises:
        CheckpointError: The package's file is not the expected vocabulary.
    """
    path = _ranks_file()
    if path is None:
        logger.info("no Qwen vocabulary at hand (pip install dashscope): no tokenizer files written")
        return False
    for name, text in (
        ("tokenizer.json", _tokenizer_text(path, path.stat().st_mtime_ns)),
        ("tokenizer_config.json", _as_text(_tokenizer_config(model_max_length, SHIPPED[kind]))),
    ):
        (directory / name).write_text(text, encoding="utf-8", newline="\n")
    return True


@lru_cache(maxsize=1)
def _tokenizer_text(path: Path, modified_ns: int) -> str:
    """The tokenizer.json for a ranks file. It is cached, because one checkpoint is often followed by another."""
    return _as_text(tokenizer_json(_read_ranks(path)))


def _as_text(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2)


def tokenizer_json(ranks: dict[bytes, int]) -> dict[str, Any]:
    """The content of Qwen3's tokenizer.json for these ranks (rank = id = merge priority)."""
    letters = byte_letters()
    spelled = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    merges = [
        [spelled[left], spelled[right]]
        for left, right in (_last_merge(t, ranks) for t in ranks if len(t) > 1)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token_id, **entry} for token_id, entry in _added_tokens().items()],
        "normalizer": NORMALIZER,
        "pre_tokenizer": PRE_TOKENIZER,
        "post_processor": BYTE_LEVEL,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelled[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def _tokenizer_config(model_max_length: int, template_name: str) -> dict[str, Any]:
    template = resources.files("guardengine.text").joinpath(template_name).read_text(encoding="utf-8")
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token_id): entry for token_id, entry in _added_tokens().items()},
        "additional_special_tokens": list(_CONTROL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": model_max_length,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _added_tokens() -> dict[int, dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        NUM_RANKS + index: {"content": content, **flags, "special": index < len(_CONTROL_TOKENS)}
        for index, content in enumerate(_CONTROL_TOKENS + _MARKUP_TOKENS)
    }


def _ranks_file() -> Path | None:
    spec = importlib.util.find_spec("dashscope")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / "resources" / "qwen.tiktoken"
        if path.is_file():
            return path
    return None


def _read_ranks(path: Path) -> dict[bytes, int]:
    mend = "reinstall dashscope (2.0.2 is known to work)"
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError):
            raise CheckpointError(
                f"{path}: line {number + 1} is {line[:80]!r}, not `base64 rank`; {mend}"
            ) from None
    if list(ranks.values()) != list(range(NUM_RANKS)) or any(bytes([b]) not in ranks for b in range(256)):
        raise CheckpointError(
            f"{path}: {len(ranks)} tokens, not the {NUM_RANKS} with ranks in order that are expected; {mend}"
        )
    return ranks


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge made `token`, found by byte-pair encoding it with the lower ranks only."""
    parts = [token[i : i + 1] for i in range(len(token))]
    # Ranks of parts[i] + parts[i + 1]; only the two beside a merge change.
    pairs = [ranks.get(token[i : i + 2], NUM_RANKS) for i in range(len(token) - 1)]
    limit = ranks[token]
    while len(parts) > 2:
        best = min(pairs)
        if best >= limit:
            raise CheckpointError(
                f"token {token!r} (rank {limit}) cannot be built from lower ranks; not BPE ranks"
            )
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del pairs[i]
        if i < len(pairs):
            pairs[i] = ranks.get(parts[i] + parts[i + 1], NUM_RANKS)
        if i:
            pairs[i - 1] = ranks.get(parts[i - 1] + parts[i], NUM_RANKS)
    return parts[0], parts[1]
