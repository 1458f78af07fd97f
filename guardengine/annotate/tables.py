"""TableSource: the rows of Parquet and Arrow files. arrow(): pyarrow, which only users of such files need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guardengine.annotate.rows import SAMPLE_ROWS, Row
from guardengine.errors import ConfigError
from guardengine.extras import how_to_install

_BATCH_ROWS = 4096
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def arrow() -> Any:
    """The module pyarrow, with its compute and parquet. Raises ConfigError when it is not installed."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"Parquet and Arrow files need pyarrow ({error}); {how_to_install('data')}"
        ) from error
    return pyarrow


class TableSource:
    """The rows of Parquet files, or of Arrow files (stream or file format), with one schema."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Read the schemas, and the columns whose type differs between files.

        Raises:
            ConfigError: A file is damaged, or the files do not belong together.
        """
        self.files = list(files)
        pa = self._pa = arrow()
        schemas = []
        for path in self.files:
            with _reading(path):
                schemas.append(self._schema(path))
            names = schemas[-1].names
            if twice := [name for name in names if names.count(name) > 1]:
                raise ConfigError(f"{path} has several columns named {twice[0]!r}; rename or drop one")
        try:
            self.schema = pa.unify_schemas(schemas, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ConfigError(
                f"{self.files[0].parent}: its files have columns of different types ({error}); give one of them"
            ) from error
        self.schema = self.schema.with_metadata(schemas[0].metadata)
        for path, schema in zip(self.files, schemas, strict=True):
            # Values that do not fit into the common type are found here, before anything is judged.
            cast = [field for field in self.schema if field.name in schema.names]
            if cast := [field for field in cast if field.type != schema.field(field.name).type]:
                for _ in self._cast_batches(path, cast):
                    pass

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
        """The columns, and the first rows. Raises ConfigError when there is no row."""
        rows = []
        for row in self.rows():
            rows.append(row.record)
            if row.number + 1 >= SAMPLE_ROWS:
                break
        if not rows:
            raise ConfigError(f"{self.files[0]} has no rows; give a file that has some")
        return list(self.schema.names), rows

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """All rows, in order, with these columns only."""
        number = 0
        for batch in self.batches(columns):
            for record, fault in python_rows(batch):
                yield Row(number, record, fault)
                number += 1

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """All rows as record batches of the common schema, or of these columns of it."""
        fields = [self.schema.field(name) for name in columns or self.schema.names]
        schema = self._pa.schema(fields, None if columns else self.schema.metadata)
        for path in self.files:
            for arrays in self._cast_batches(path, fields):
                yield self._pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _cast_batches(self, path: Path, fields: Sequence[Any]) -> Iterator[list[Any]]:
        """A file's columns converted to the types of the fields; nulls for columns that it does not have."""
        pa = self._pa
        with _reading(path):
            for batch in self._batches(path, [field.name for field in fields]):
                arrays = []
                for field in fields:
                    index = batch.schema.get_field_index(field.name)
                    array = pa.nulls(batch.num_rows, field.type) if index < 0 else batch.column(index)
                    try:
                        arrays.append(array if array.type == field.type else array.cast(field.type))
                    except pa.ArrowException as error:
                        raise ConfigError(
                            f"{path}: column {field.name!r} is {array.type}, and elsewhere {field.type}, which cannot "
                            f"represent all of its values ({error}); give files of one type"
                        ) from error
                yield arrays

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
            if _is_stream(reader) and not _ends_as_stream(path):
                raise ConfigError(f"{path} has no end mark, so rows may be missing: write it again")
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
    """The rows of a batch as dicts, each with what is wrong with one of its cells, or None."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, times out of the range of Python's types
        for index in range(batch.num_rows):
            record: dict[str, Any] = {}
            fault = None
            for name in batch.schema.names:
                cell = batch.column(name)[index]
                try:
                    record[name] = cell.as_py()
                except UnicodeDecodeError:
                    fault = fault or f"column {name!r} is not valid UTF-8"
                    record[name] = _replaced(cell)
                except (ValueError, OverflowError) as error:
                    record[name] = _as_text(cell)
                    if record[name] is None:
                        fault = fault or f"column {name!r} is not readable: {error}"
            yield record, fault
        return
    for row in rows:
        yield row, None


def _replaced(cell: Any) -> str | None:
    """Text in which bytes that are not UTF-8 are U+FFFD; None for lists and structs with such text."""
    buffer = getattr(cell, "as_buffer", None)
    return None if buffer is None else buffer().to_pybytes().decode("utf-8", "replace")


def _as_text(cell: Any) -> str | None:
    """A value that Python's types cannot represent, such as a time in nanoseconds, as Arrow writes it; or None."""
    pa = arrow()
    try:
        text: str = pa.compute.cast(cell, pa.string()).as_py()
    except pa.ArrowException:
        return None
    return text.replace(" ", "T", 1) if pa.types.is_timestamp(cell.type) else text


def _arrow_batches(reader: Any) -> Iterator[Any]:
    if _is_stream(reader):
        yield from reader
    else:
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def _is_stream(reader: Any) -> bool:
    return not hasattr(reader, "num_record_batches")


def _ends_as_stream(path: Path) -> bool:
    """Whether an Arrow stream has its end mark. Without it, a stream that was cut off between two batches looks
    complete."""
    with path.open("rb") as file:
        file.seek(-min(len(_END_OF_STREAM), path.stat().st_size), 2)
        return file.read() == _END_OF_STREAM


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    pa = arrow()
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read ({error}); is it whole?") from error
