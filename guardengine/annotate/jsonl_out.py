"""Write OUT as JSON lines: all rows in order, with all of their columns and the guard's. BadRows: the file of the rows
that were not judged."""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

from guardengine.annotate.journal import Annotation, Entry, Fault
from guardengine.annotate.layout import Layout
from guardengine.annotate.rows import JsonlSource, Row
from guardengine.annotate.tables import TableSource
from guardengine.errors import ConfigError

_EXCERPT_CHARS = 200

Source = JsonlSource | TableSource
EntryOf = Callable[[int], Entry]  # by a row's number


class Columns(NamedTuple):
    """The names of the columns that are added. Their values are explained in `annotation`."""

    risk: str
    category: str
    scores: str
    first_flag_token: str
    first_flag_char: str

    @staticmethod
    def with_prefix(prefix: str) -> Columns:
        """The names with a prefix, such as "guard_risk"."""
        return Columns(*(prefix + name for name in Columns._fields))

    def values(self, entry: Entry) -> dict[str, Any]:
        """The values of these columns for a row; all None where it was not judged."""
        if isinstance(entry, Fault):
            return dict.fromkeys(self)
        return {name: getattr(entry, field) for name, field in zip(self, Columns._fields, strict=True)}


class BadRows:
    """Writes the rows that were not judged to a file of JSON lines, with the reason."""

    def __init__(self, file: IO[bytes], layout: Layout) -> None:
        self._file, self._layout = file, layout
        self.num_rows = 0

    def add(self, row: Row, reason: str) -> None:
        self.num_rows += 1
        where = {} if row.line is None else {"file": row.file, "line": row.line}
        text = (
            json.dumps({name: row.record.get(name) for name in self._layout.columns}, default=plain)
            if row.record or row.raw is None
            else row.raw[: 4 * _EXCERPT_CHARS].decode("utf-8", "backslashreplace")
        )
        excerpt = text if len(text) <= _EXCERPT_CHARS else text[:_EXCERPT_CHARS] + "..."
        line = {"row": row.number, **where, "reason": reason, "excerpt": excerpt}
        self._file.write(json.dumps(line).encode() + b"\n")

    def clear(self) -> None:
        """Empty the file."""
        self.num_rows = 0
        self._file.seek(0)
        self._file.truncate()


def write_jsonl(
    source: Source, entry_of: EntryOf, columns: Columns, bad: BadRows, limit: int, file: IO[bytes]
) -> None:
    """Write all rows as JSON lines. A line of the input stays as it is, with the new columns added at its end."""
    for row in first(source.rows(), limit):
        entry = entry_of(row.number)
        # A fault in a column that is not judged: the row was judged all the same, and cannot be written.
        if row.fault is not None and isinstance(entry, Annotation):
            entry = Fault(row.fault)
        if isinstance(entry, Fault):
            bad.add(row, entry.reason)
        added = json.dumps(columns.values(entry), ensure_ascii=False).encode()
        if row.raw is None:
            line = as_json(dict(row.record))[:-1].rstrip() + b", " + added[1:] if row.record else added
        elif not row.record:
            line = added
        elif set(columns) & row.record.keys():  # a bad row that has columns of these names: they are replaced
            line = as_json({**row.record, **columns.values(entry)})
        else:
            line = row.raw[:-1].rstrip() + b", " + added[1:]
        file.write(line + b"\n")


def first(rows: Iterator[Row], limit: int) -> Iterator[Row]:
    """The first `limit` rows."""
    for row in rows:
        if row.number >= limit:
            return
        yield row


def as_json(record: Mapping[str, Any]) -> bytes:
    """A record as a JSON object. NaN and infinities, which JSON does not have, become null; for other values see
    `plain`."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, default=plain)
    except ValueError:
        text = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, default=plain)
    try:
        return text.encode()
    except UnicodeEncodeError:  # lone surrogates stay escaped, as they were in the input
        return json.dumps(_finite(record), default=plain).encode()


def plain(value: Any) -> Any:
    """A value that JSON does not have: times in ISO format, bytes in base64, everything else as str() writes it."""
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def check_columns(columns: Columns, present: list[str]) -> None:
    """Raise ConfigError when the input already has one of the columns that are to be added."""
    for name in columns:
        if name in present:
            raise ConfigError(f"the input has a column {name!r} already; choose another --prefix")
