"""read_rows(): labelled conversations from files in Qwen3GuardTest's format. Knows no model.

A row has "message" (or "messages"), a list of {"role", "content"}; "label", "Safe" or "Unsafe"; and, where the first
unsafe sentence was marked, "unsafe_start_index" and "unsafe_end_index": token indices into the rendered conversation,
both inclusive. "input_ids", when present, are the tokens that these indices were counted on. Other columns are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guardengine.errors import ConfigError, GuardEngineError, InvalidText

_LABELS = {"Safe": False, "Unsafe": True}
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled conversation. `span` is that of the first unsafe sentence, None where there is none on record."""

    file: Path
    where: str  # for messages about it
    messages: list[dict[str, Any]]
    is_unsafe: bool
    span: tuple[int, int] | None
    token_ids: list[int] | None


@dataclass
class BadRows:
    """Rows that cannot be used, up to `allowed`."""

    allowed: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, where: str, error: GuardEngineError) -> None:
        """Leave a row out, or raise its error, with the row's place, when that is one too many."""
        self.reasons.append(f"{where}: {error}")
        if len(self.reasons) > self.allowed:
            allowed = f"; {self.allowed} bad rows are allowed (--allow-bad-rows)" if self.allowed else ""
            raise type(error)(self.reasons[-1] + allowed) from None


def read_rows(file: Path, bad_rows: BadRows, max_rows: int | None = None) -> list[Row]:
    """The rows of a .parquet file, or of a file of JSON lines; at most the first `max_rows`.

    Raises ConfigError for a file that cannot be read or has no rows; InvalidText, naming file and line, for a bad row
    beyond those that are allowed.
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
    """Each line that is not empty, as text: `_row` parses it."""
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
            f"{file}: Parquet needs pyarrow ({error}); pip install 'guardengine[evaluate]', or give JSON lines"
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
            f'"message" is {_shown(messages)}; a non-empty list of {{"role", "content"}} is needed'
        )
    label = record.get("label")
    if not isinstance(label, str) or label not in _LABELS:
        raise InvalidText(f'"label" is {_shown(label)}; "Safe" or "Unsafe" is needed')
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
            f"the unsafe span is from unsafe_start_index {start} to unsafe_end_index {end}; two token indices from 0 "
            "are needed, the first not behind the last, or none at all"
        )
    return start, end


def _index(name: str, value: Any) -> int | None:
    """None stands for a missing value, and so does NaN, which data frames write."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise InvalidText(f'"{name}" is {_shown(value)}; a whole number is needed')
    return int(value)


def _token_ids(value: Any) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise InvalidText(f'"input_ids" is {_shown(value)}; a list of whole numbers is needed, or none')
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
