"""read_rows(): labelled conversations from files in the format of Qwen3GuardTest. Knows no model.

A row has "message" (or "messages"), a list of {"role", "content"}; "label", "Safe" or "Unsafe"; and, where the first
unsafe sentence was marked, "unsafe_start_index" and "unsafe_end_index": indices of tokens in the rendered
conversation, both inclusive. "input_ids", if present, are the tokens that these indices refer to. Other columns are
ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guardengine.errors import ConfigError, GuardEngineError, InvalidText
from guardengine.extras import how_to_install

_LABELS = {"Safe": False, "Unsafe": True}
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled conversation.

    Attributes:
        file: The file of the row.
        where: The place of the row, for messages.
        messages: The conversation.
        is_unsafe: Its label.
        span: The tokens of the first unsafe sentence, both inclusive; None where it was not marked.
        token_ids: The tokens that the span refers to, None where the row does not have them.
    """

    file: Path
    where: str
    messages: list[dict[str, Any]]
    is_unsafe: bool
    span: tuple[int, int] | None
    token_ids: list[int] | None


@dataclass
class BadRows:
    """The rows that cannot be used. More than `allowed` raise."""

    allowed: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, where: str, error: GuardEngineError) -> None:
        """Leave a row out; or raise its error, with its place, when that is one more than allowed."""
        self.reasons.append(f"{where}: {error}")
        if len(self.reasons) > self.allowed:
            allowed = f"; {self.allowed} bad rows are allowed (--allow-bad-rows)" if self.allowed else ""
            raise type(error)(self.reasons[-1] + allowed) from None


def read_rows(file: Path, bad_rows: BadRows, max_rows: int | None = None) -> list[Row]:
    """Read the rows of a .parquet file, or of a file of JSON lines.

    Args:
        file: The file.
        bad_rows: Collects the rows that cannot be used.
        max_rows: Read only the first so many rows.

    Raises:
        ConfigError: The file cannot be read, or has no usable rows.
        InvalidText: A row cannot be used, and no more bad rows are allowed. The message has its file and line.
    """
    found: list[Row] = []
    records = _parquet(file) if file.suffix == ".parquet" else _json_lines(file)
    for number, (where, record) in enumerate(records):
        if max_rows is not None and number >= max_rows:
            break
        try:
            found.append(_row(file, where, record))
        except InvalidText as error:
            bad_rows.add(where, error)
    if not found:
        raise ConfigError(f"{file} has no usable rows; give a file of labelled conversations, one a row")
    return found


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Each line that is not empty, as text, which `_row` parses."""
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}, line {number}", line
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); give a UTF-8 file of JSON lines") from error


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ConfigError(
            f"{file}: Parquet needs pyarrow ({error}); {how_to_install('evaluate')}; or give JSON lines"
        ) from error
    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", record
    except (OSError, ArrowException) as error:
        raise ConfigError(f"{file} cannot be read ({error}); give a Parquet file") from error


def _row(file: Path, where: str, record: Any) -> Row:
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError) as error:
            raise InvalidText(f"not JSON ({error}); write one object a line") from None
    if not isinstance(record, Mapping):
        raise InvalidText(f"{_shown(record)} is not an object with message and label")
    messages = record.get("message")
    if messages is None:
        messages = record.get("messages")
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(message, Mapping) for message in messages)
    ):
        raise InvalidText(
            f'"message" is {_shown(messages)}; it must be a non-empty list of {{"role", "content"}}'
        )
    label = record.get("label")
    if not isinstance(label, str) or label not in _LABELS:
        raise InvalidText(f'"label" is {_shown(label)}; it must be "Safe" or "Unsafe"')
    return Row(
        file=file,
        where=where,
        messages=[{k: v for k, v in message.items() if v is not None} for message in messages],
        is_unsafe=_LABELS[label],
        span=_span(record),
        token_ids=_token_ids(record.get("input_ids")),
    )


def _span(record: Mapping[str, Any]) -> tuple[int, int] | None:
    start, end = (_index(name, record.get(name)) for name in ("unsafe_start_index", "unsafe_end_index"))
    if start is None and end is None:
        return None
    if start is None or end is None or not 0 <= start <= end:
        raise InvalidText(
            f"the unsafe span is from unsafe_start_index {start} to unsafe_end_index {end}; give two token "
            "indices from 0, the first not after the last, or neither"
        )
    return start, end


def _index(name: str, value: Any) -> int | None:
    """A token index. None for a missing value, and for NaN, which data frames write for one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise InvalidText(f'"{name}" is {_shown(value)}; it must be a whole number')
    return int(value)


def _token_ids(value: Any) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise InvalidText(
            f'"input_ids" is {_shown(value)}; it must be a list of whole numbers, or be left out'
        )
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
