"""TableSource: rows from Parquet and Arrow files. arrow(): pyarrow, which only those who read or write them need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guardengine.annotate.rows import SAMPLE_ROWS, Row
from guardengine.errors import ConfigError

_BATCH_ROWS = 4096


def arrow() -> Any:
    """The module pyarrow, with its compute and parquet. Raises ConfigError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"Parquet and Arrow files need pyarrow ({error}): pip install 'guardengine[data]'"
        ) from error
    return pyarrow


class TableSource:
    """The rows of Parquet files, or of Arrow files (stream or file format), under one schema."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Reads the schemas. Raises ConfigError for files that are damaged or do not belong together."""
        self.files = list(files)
        pa = self._pa = arrow()
        schemas = []
        for path in self.files:
            with _reading(path):
                schemas.append(self._schema(path))
        try:
            self.schema = pa.unify_schemas(schemas, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ConfigError(
                f"{self.files[0].parent}: its files have columns of different types ({error}); give one of them"
            ) from error
        self.schema = self.schema.with_metadata(schemas[0].metadata)

    def num_rows(self) -> int:
        pa = self._pa
        total = 0
        for path in self.files:
            with _reading(path):
                if path.suffix.lower() == ".parquet":
                    total += pa.parquet.read_metadata(path).num_rows
                else:
                    total += sum(batch.num_rows for batch in self._batches(path, None))
        return total

    def sample(self) -> tuple[list[str], list[Mapping[str, Any]]]:
        """The columns, and the first rows."""
        rows = []
        for row in self.rows():
            rows.append(row.record)
            if row.number + 1 >= SAMPLE_ROWS:
                break
        return list(self.schema.names), rows

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """All rows, in order, with these columns only."""
        number = 0
        for batch in self.batches(columns):
            for record, fault in python_rows(batch):
                yield Row(number, record, fault)
                number += 1

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """All rows as record batches of the one schema, or of these columns of it."""
        pa = self._pa
        fields = [self.schema.field(name) for name in columns or self.schema.names]
        for path in self.files:
            with _reading(path):
                for batch in self._batches(path, columns):
                    arrays = []
                    for field in fields:
                        index = batch.schema.get_field_index(field.name)
                        if index < 0:
                            arrays.append(pa.nulls(batch.num_rows, field.type))
                        else:
                            array = batch.column(index)
                            arrays.append(array if array.type == field.type else array.cast(field.type))
                    schema = pa.schema(fields, None if columns else self.schema.metadata)
                    yield pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _schema(self, path: Path) -> Any:
        if path.suffix.lower() == ".parquet":
            return self._pa.parquet.read_schema(path)
        with self._pa.OSFile(str(path)) as file:
            return self._open_arrow(file).schema

    def _batches(self, path: Path, columns: Sequence[str] | None) -> Iterator[Any]:
        if path.suffix.lower() == ".parquet":
            with self._pa.parquet.ParquetFile(path) as file:
                present = (
                    None if columns is None else [name for name in columns if name in file.schema_arrow.names]
                )
                yield from file.iter_batches(_BATCH_ROWS, columns=present)
            return
        with self._pa.OSFile(str(path)) as file:
            reader = self._open_arrow(file)
            for batch in _arrow_batches(reader):
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield batch.slice(start, _BATCH_ROWS)

    def _open_arrow(self, file: Any) -> Any:
        try:
            return self._pa.ipc.open_stream(file)
        except self._pa.ArrowInvalid:
            file.seek(0)
            return self._pa.ipc.open_file(file)


def python_rows(batch: Any) -> Iterator[tuple[dict[str, Any], str | None]]:
    """A batch's rows as dicts, each with what is wrong with a cell of it, or None."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, times that Python's types do not hold
        for index in range(batch.num_rows):
            record: dict[str, Any] = {}
            fault = None
            for name in batch.schema.names:
                cell = batch.column(name)[index]
                try:
                    record[name] = cell.as_py()
                except (ValueError, OverflowError) as error:
                    kind = (
                        "not valid UTF-8"
                        if isinstance(error, UnicodeDecodeError)
                        else f"not readable: {error}"
                    )
                    fault = fault or f"column {name!r} is {kind}"
                    record[name] = _replaced(cell)
            yield record, fault
        return
    for row in rows:
        yield row, None


def _replaced(cell: Any) -> str | None:
    """Text with U+FFFD for what is not UTF-8; None for other values that cannot be read."""
    buffer = getattr(cell, "as_buffer", None)
    return None if buffer is None else buffer().to_pybytes().decode("utf-8", "replace")


def _arrow_batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):  # the file format
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
    else:
        yield from reader


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    pa = arrow()
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read ({error}); is it whole?") from error
