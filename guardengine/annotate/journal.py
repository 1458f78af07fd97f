"""Journal: the annotations so far, in a file that is only appended to and survives a kill at any moment.

Its first line is a JSON object that says what is annotated with what; after it comes one line for each row, in the
order in which rows were judged. Many rows are appended by one write, which is on the disk when it returns. When a kill
or a full disk cuts a write off, the incomplete last line is removed: a line counts only when its end is there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from guardengine.errors import ConfigError, OutputError

FORMAT = 1
_OPENING = b'{"format": '  # how every journal begins, also one that was cut off early


@dataclass(frozen=True, slots=True)
class Annotation:
    """A row's annotation. `annotation` explains the fields."""

    risk: str
    category: str | None
    scores: dict[str, float]
    first_flag_token: int | None
    first_flag_char: int | None


@dataclass(frozen=True, slots=True)
class Fault:
    """The reason why a row was not judged."""

    reason: str


Entry = Annotation | Fault


class Journal:
    """The journal of one run over `num_rows` rows. Made by `open`; a context manager that closes the file.

    Attributes:
        is_new: Whether `open` began it.
        counts: Number of annotated rows by risk.
        num_faults: Number of rows that were not judged.
        score_names: All keys of scores, in the order in which they came.
    """

    def __init__(self, path: Path, file: io.FileIO, num_rows: int) -> None:
        self.path, self._file = path, file
        self._offsets = np.full(num_rows, -1, np.int64)  # where a row's line begins; -1: not judged yet
        self._size = 0
        self.is_new = False
        self.counts: Counter[str] = Counter()
        self.num_faults = 0
        self.score_names: dict[str, None] = {}

    @staticmethod
    def open(path: Path, header: Mapping[str, Any], num_rows: int, *, restart: bool) -> Journal:
        """Open the journal at `path`, or begin it.

        Args:
            path: The file.
            header: What is annotated with what. An existing journal must have the same header.
            num_rows: How many rows there are.
            restart: Empty an existing journal.

        Raises:
            ConfigError: The journal belongs to another run, is damaged, or another process writes to it; or the file
                is not a journal, which is left unchanged even with `restart`.
            OutputError: The file cannot be written.
        """
        try:
            file = open_file(path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error}); give another OUT") from error
        journal = Journal(path, file, num_rows)
        try:
            journal._lock()
            journal._begin({"format": FORMAT, **header}, restart)
        except BaseException:
            file.close()
            raise
        return journal

    @property
    def num_done(self) -> int:
        return int(self.is_done.sum())

    @property
    def is_done(self) -> npt.NDArray[np.bool_]:
        """bool [num_rows]: rows whose entry was appended."""
        return self._offsets >= 0

    def has(self, row: int) -> bool:
        return bool(self._offsets[row] >= 0)

    def entry(self, row: int) -> Entry:
        """The entry of a row that is done."""
        if not self.has(row):
            raise RuntimeError(f"row {row} has not been judged")
        line = os.pread(self._file.fileno(), 4096, self._offsets[row])
        while b"\n" not in line:
            line += os.pread(self._file.fileno(), 1 << 16, self._offsets[row] + len(line))
        return of_line(line[: line.index(b"\n")])[1]

    def append(self, entries: Iterable[tuple[int, Entry]]) -> None:
        """Append the entries of rows. When this returns all of them are on the disk.

        Raises:
            OutputError: They cannot be written. The journal is unchanged.
        """
        lines: list[bytes] = []
        rows: list[tuple[int, int, Entry]] = []
        size = self._size
        for row, entry in entries:
            rows.append((row, size, entry))
            lines.append(to_line(row, entry))
            size += len(lines[-1])
        if not rows:
            return
        self._write(b"".join(lines))
        for row, offset, entry in rows:
            self._record(row, offset, entry)

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Delete the file, while it is still locked."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- internals -----------------------------------------------------------------------------------------

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            is_ours = error.errno not in (errno.EAGAIN, errno.EACCES)  # such as file systems without locks
        else:
            # False: the process that had it locked has finished, and removed it.
            is_ours = self._is_at_path()
        if not is_ours:
            raise ConfigError(
                f"{self.path} is in use by another process, which writes the same OUT; wait for it, or give another OUT"
            )

    def _is_at_path(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _begin(self, header: dict[str, Any], restart: bool) -> None:
        opening = os.pread(self._file.fileno(), len(_OPENING), 0)
        if opening != _OPENING[: len(opening)]:
            raise ConfigError(
                f"{self.path} exists and is not the journal of an annotation; remove it, or give another OUT"
            )
        if restart:
            self._file.truncate(0)
        whole = 0  # bytes in whole lines
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                if number == 1:
                    self._check_header(line, header)
                else:
                    self._read(number, line, whole)
                whole += len(line)
        self._file.truncate(whole)
        self._size = whole
        if not whole:
            self.is_new = True
            self._write(json.dumps(header).encode() + b"\n")

    def _check_header(self, line: bytes, header: dict[str, Any]) -> None:
        try:
            old = json.loads(line)
        except (ValueError, RecursionError):
            old = None
        if not isinstance(old, dict):
            raise self._damaged(1)
        changes = [
            f"{name.replace('_', '-')} ({_shown(old.get(name))}, now {_shown(header.get(name))})"
            for name in (*header, *(old.keys() - header.keys()))
            if old.get(name) != header.get(name)
        ]
        if changes:
            raise ConfigError(
                f"{self.path} was begun with another {', '.join(changes)}; continue with the same, give --restart to "
                "begin anew, or give another OUT"
            )

    def _read(self, number: int, line: bytes, offset: int) -> None:
        try:
            row, entry = of_line(line)
            if type(row) is not int or not 0 <= row < len(self._offsets):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self._damaged(number) from None
        if not self.has(row):
            self._record(row, offset, entry)

    def _damaged(self, number: int) -> ConfigError:
        return ConfigError(
            f"{self.path}, line {number}: damaged; give --restart to begin anew, or another OUT"
        )

    def _record(self, row: int, offset: int, entry: Entry) -> None:
        self._offsets[row] = offset
        if isinstance(entry, Fault):
            self.num_faults += 1
        else:
            self.counts[entry.risk] += 1
            self.score_names |= dict.fromkeys(entry.scores)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) or 0 :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise write_error(self.path, error) from error
        self._size += len(data)


def to_line(row: int, entry: Entry) -> bytes:
    """The line of a row, with its line break."""
    kind = "fault" if isinstance(entry, Fault) else "annotation"
    value = entry.reason if isinstance(entry, Fault) else asdict(entry)
    return json.dumps({"row": row, kind: value}).encode() + b"\n"


def of_line(line: bytes) -> tuple[int, Entry]:
    """The row and the entry of a line. Raises ValueError, TypeError or KeyError for anything else."""
    fields = json.loads(line)
    entry = Fault(fields["fault"]) if "fault" in fields else Annotation(**fields["annotation"])
    return fields["row"], entry


def open_file(path: Path) -> io.FileIO:
    """Open a file for appending, unbuffered."""
    return io.FileIO(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")


def write_error(path: Path, error: OSError) -> OutputError:
    """The error for a write that failed."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    mend = "make room" if is_full else "repair that"
    return OutputError(
        f"{path} cannot be written ({error.strerror or error}); {mend} and run the same command again: it continues "
        "where this one stopped"
    )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return f"{text[:10]}..." if isinstance(value, str) and len(value) == 64 else text
