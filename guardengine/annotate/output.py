"""Write OUT from the input and the journal.

It is written beside its place and renamed when it is complete, so nobody ever sees a part of OUT. Writing it again
gives the same bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from guardengine.annotate.journal import Entry, Journal, write_error
from guardengine.annotate.jsonl_out import BadRows, Columns, Source, write_jsonl
from guardengine.annotate.layout import Layout
from guardengine.annotate.parquet_out import GuardColumns, LinesToParquet, write_table
from guardengine.annotate.rows import JsonlSource


class Written(NamedTuple):
    """The result of writing OUT.

    Attributes:
        num_bad: Number of rows that were not judged.
        as_text: Columns whose values were converted to JSON text.
    """

    num_bad: int
    as_text: tuple[str, ...]


def write_output(
    source: Source,
    out: Path,
    layout: Layout,
    columns: Columns,
    journal: Journal,
    num_rows: int,
    *,
    before_placing: Callable[[], None],
    progress: bool,
) -> Written:
    """Write OUT and the file of bad rows, and put both in place.

    Args:
        source: The input.
        out: The path of OUT; its suffix decides the format.
        layout: The columns that were judged.
        columns: The columns that are added.
        journal: The entries of all rows.
        num_rows: How many rows of the input are written.
        before_placing: Called when both files are complete; when it raises, neither is put in place.
        progress: Show a progress bar.

    Raises:
        OutputError: A file cannot be written.
    """
    as_text: list[str] = []

    def write(file: IO[bytes], bad_file: IO[bytes]) -> int:
        bad = BadRows(bad_file, layout)
        if out.suffix.lower() == ".jsonl":
            write_jsonl(source, entry_of, columns, bad, num_rows, file)
        else:
            guard = GuardColumns(columns, list(journal.score_names))
            if isinstance(source, JsonlSource):
                lines = LinesToParquet(source, guard, num_rows)
                lines.leave_out(columns)
                lines.write(entry_of, bad, file)
                as_text.extend(sorted(lines.as_text))
            else:
                write_table(source, entry_of, guard, bad, num_rows, file)
        before_placing()
        return bad.num_rows

    with tqdm(
        total=num_rows, desc=f"writing {out.name}", unit="row", delay=3, leave=False, disable=not progress
    ) as bar:

        def entry_of(row: int) -> Entry:
            bar.update()
            return journal.entry(row)

        num_bad = Output(out).write(write)
    return Written(num_bad, tuple(as_text))


class Output:
    """OUT and OUT.bad.jsonl, first as temporary files beside their places."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bad_path = Path(f"{path}.bad.jsonl")
        self._temporaries = Path(f"{self.path}.tmp"), Path(f"{self.bad_path}.tmp")

    @property
    def places(self) -> list[Path]:
        """Every file that `write` writes or removes."""
        return [self.path, self.bad_path, *self._temporaries]

    def write(self, write: Callable[[IO[bytes], IO[bytes]], int]) -> int:
        """Let `write` fill the two files and return the number of bad rows, then put both in place.

        Returns:
            The number of bad rows.

        Raises:
            OutputError: A file cannot be written. The files that were there before are unchanged.
        """
        new_out, new_bad = self._temporaries
        try:
            with open_new(new_out) as out, open_new(new_bad) as bad:
                num_bad = write(out, bad)
                for file in (out, bad):
                    file.flush()
                    os.fsync(file.fileno())
            if num_bad:
                os.replace(new_bad, self.bad_path)
            else:
                self.bad_path.unlink(missing_ok=True)
            os.replace(new_out, self.path)
            _sync_folder(self.path.parent)
            return num_bad
        except OSError as error:
            raise write_error(self.path, error) from error
        finally:
            for temporary in self._temporaries:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)


def open_new(path: Path) -> IO[bytes]:
    return path.open("wb")


def _sync_folder(folder: Path) -> None:
    """Make the rename durable before the journal is removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
