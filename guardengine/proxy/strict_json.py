"""read_json(): JSON of which there is only one reading, so that who reads it next cannot read something else."""

from __future__ import annotations

import json
import math
from typing import Any


def read_json(body: bytes) -> Any:
    """The value of a JSON text. Raises ValueError, which says why and quotes nothing, for what is no JSON and for what
    parsers read in different ways: a key that is there twice, NaN, numbers out of range, halves of surrogate pairs,
    a byte order mark, and everything that is not UTF-8."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark")
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON (at character {error.pos})") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it has half of a surrogate pair") from None
    return value


def write_json(value: Any) -> bytes:
    """A value that `read_json` gave, in ASCII, which nobody reads in another way."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice in one object")
    return found


def _constant(_: str) -> Any:
    raise ValueError("it has NaN or Infinity, which JSON has not")


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("it has a number out of range")
    return number


def _int(digits: str) -> int:
    if len(digits) > 32:
        raise ValueError("it has a number out of range")
    return int(digits)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
)
