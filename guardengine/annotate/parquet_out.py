"""Write OUT as Parquet: from tables with their own schema, from JSON lines with a schema that is inferred."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

from guardengine.annotate.journal import Entry, Fault
from guardengine.annotate.jsonl_out import BadRows, Columns, EntryOf, first
from guardengine.annotate.rows import JsonlSource, Row
from guardengine.annotate.tables import TableSource, arrow, python_rows

_BATCH_ROWS = 4096
_HUGGINGFACE = b"huggingface"


class GuardColumns:
    """The added columns in Arrow: two texts, a struct with the probability of each risk, and two counts."""

    def __init__(self, columns: Columns, score_names: Sequence[str]) -> None:
        self._pa = pa = arrow()
        # A struct needs at least one field; when no row was judged all structs are null.
        scores = pa.struct([(name, pa.float64()) for name in score_names or ("Safe",)])
        types = (pa.string(), pa.string(), scores, pa.int64(), pa.int64())
        self._columns = columns
        self.fields = [pa.field(name, kind) for name, kind in zip(columns, types, strict=True)]

    def arrays(self, entries: Sequence[Entry]) -> list[Any]:
        rows = [self._columns.values(entry) for entry in entries]
        return [self._pa.array([row[field.name] for row in rows], field.type) for field in self.fields]

    def metadata(self, metadata: dict[bytes, bytes] | None) -> dict[bytes, bytes] | None:
        """A schema's metadata, with these columns added to the features that the datasets library stores there."""
        if not metadata or _HUGGINGFACE not in metadata:
            return metadata
        try:
            features = (value := json.loads(metadata[_HUGGINGFACE]))["info"]["features"]
            features.update({field.name: self._feature(field.type) for field in self.fields})
            return {**metadata, _HUGGINGFACE: json.dumps(value).encode()}
        except (ValueError, KeyError, TypeError, AttributeError):  # datasets then infers the types
            return {key: item for key, item in metadata.items() if key != _HUGGINGFACE}

    def _feature(self, kind: Any) -> dict[str, Any]:
        if self._pa.types.is_struct(kind):
            return {field.name: self._feature(field.type) for field in kind}
        return {"dtype": {"double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}


def write_table(
    source: TableSource, entry_of: EntryOf, guard: GuardColumns, bad: BadRows, limit: int, file: IO[bytes]
) -> None:
    """Write all rows of a table. Its own columns and types stay as they are."""
    pa = arrow()
    schema = pa.schema([*source.schema, *guard.fields], guard.metadata(source.schema.metadata))
    number = 0
    with pa.parquet.ParquetWriter(file, schema) as writer:
        for batch in source.batches():
            batch = batch.slice(0, limit - number)
            if not batch.num_rows:
                break
            entries = [entry_of(row) for row in range(number, number + batch.num_rows)]
            for index, entry in enumerate(entries):
                if isinstance(entry, Fault):
                    record, _ = next(python_rows(batch.slice(index, 1)))
                    bad.add(Row(number + index, record), entry.reason)
            arrays = [*batch.columns, *guard.arrays(entries)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            number += batch.num_rows


class LinesToParquet:
    """JSON lines as a table. The type of a column is one that can represent all of its values; where there is none
    (text in one row and numbers in another) the values are written as JSON text."""

    def __init__(self, source: JsonlSource, guard: GuardColumns, limit: int) -> None:
        """Read all rows once, to infer the types."""
        self._pa = arrow()
        self._source, self._guard, self._limit = source, guard, limit
        self._types: dict[str, Any] = {}
        self.as_text: set[str] = set()  # columns that are written as JSON text
        for rows in self._batches():
            for name in dict.fromkeys(name for row in rows for name in row.record):
                self._widen(name, [row.record.get(name) for row in rows])

    def leave_out(self, names: Columns) -> None:
        """Leave out columns of these names. Only bad rows have them, and the added columns replace them."""
        for name in names:
            self._types.pop(name, None)

    def write(self, entry_of: EntryOf, bad: BadRows, file: IO[bytes]) -> None:
        """Write all rows. Text that is not valid Unicode makes a row bad: Parquet cannot store it, and gets U+FFFD."""
        while True:
            try:
                return self._write(entry_of, bad, file)
            except _Unwritable as error:  # such as whole numbers too large for floating point
                self.as_text.add(str(error))
                bad.clear()
                file.seek(0)
                file.truncate()

    # -- internals -----------------------------------------------------------------------------------------

    def _batches(self) -> Iterator[list[Row]]:
        rows: list[Row] = []
        for row in first(self._source.rows(), self._limit):
            rows.append(_without_surrogates(row))
            if len(rows) == _BATCH_ROWS:
                yield rows
                rows = []
        if rows:
            yield rows

    def _write(self, entry_of: EntryOf, bad: BadRows, file: IO[bytes]) -> None:
        pa = self._pa
        schema = pa.schema([pa.field(name, self._type(name)) for name in self._types] + self._guard.fields)
        with pa.parquet.ParquetWriter(file, schema) as writer:
            for rows in self._batches():
                entries = []
                for row in rows:
                    entry = entry_of(row.number)
                    if row.fault is not None and not isinstance(entry, Fault):
                        entry = Fault(row.fault)
                    if isinstance(entry, Fault):
                        bad.add(row, entry.reason)
                    entries.append(entry)
                arrays = [self._array(name, [row.record.get(name) for row in rows]) for name in self._types]
                writer.write_table(
                    pa.Table.from_arrays([*arrays, *self._guard.arrays(entries)], schema=schema)
                )

    def _widen(self, name: str, values: list[Any]) -> None:
        pa = self._pa
        if name in self.as_text:
            return
        try:
            kind = pa.array(values).type
            if name in self._types:
                old, new = (pa.schema([(name, kind)]) for kind in (self._types[name], kind))
                kind = pa.unify_schemas([old, new], promote_options="permissive").field(name).type
            if "struct<>" in str(kind):  # Parquet has no empty structs
                raise ValueError
            self._types[name] = kind
        except (pa.ArrowException, OverflowError, ValueError, TypeError):
            self._types[name] = None
            self.as_text.add(name)

    def _type(self, name: str) -> Any:
        return self._pa.string() if name in self.as_text else self._types[name]

    def _array(self, name: str, values: list[Any]) -> Any:
        if name in self.as_text:
            values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        try:
            return self._pa.array(values, self._type(name))
        except (self._pa.ArrowException, OverflowError, ValueError, TypeError):
            raise _Unwritable(name) from None


class _Unwritable(Exception):
    """A column has a value that its type cannot represent."""


def _without_surrogates(row: Row) -> Row:
    try:
        json.dumps(row.record, ensure_ascii=False).encode()
        return row
    except UnicodeEncodeError:
        text = (
            json.dumps(row.record, ensure_ascii=False)
            .encode("utf-16", "surrogatepass")
            .decode("utf-16", "replace")
        )
        reason = "text with a lone surrogate, which is not valid Unicode and which Parquet cannot store"
        return Row(row.number, json.loads(text), reason, row.raw, row.file, row.line)
