"""Journal: what was annotated so far, in a file that is only appended to and survives a kill at any moment.

One JSON line first that says what is annotated with what, then one for each row, in the order in which they were
judged. Rows are appended many at a time, by one write that is on the disk when it returns. What a kill or a full disk
leaves of a write is cut off: a line counts when its end is there.
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
_OPENING = b'{"format": '  # of every journal, however little a kill has left of it


@dataclass(frozen=True, slots=True)
class Annotation:
    """What a checkpoint says of a row under a policy. See `judging.annotation` for what the fields mean."""

    risk: str
    category: str | None
    scores: dict[str, float]
    first_flag_token: int | None
    first_flag_char: int | None


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row was not judged."""

    reason: str


Entry = Annotation | Fault


class Journal:
    """The journal of one run over `num_rows` rows. Made by `open`; a context manager, which closes the file.

    is_new: whether it was begun by `open`. counts: annotated rows by risk. num_faults: rows that were not judged.
    score_names: all keys of scores, in the order in which they came.
    """

    def __init__(self, path: Path, file: io.FileIO, num_rows: int) -> None:
        self.path, self._file = path, file
        self._offsets = np.full(num_rows, -1, np.int64)  # of a row's line; -1: to be judged
        self._size = 0
        self.is_new = False
        self.counts: Counter[str] = Counter()
        self.num_faults = 0
        self.score_names: dict[str, None] = {}

    @staticmethod
    def open(path: Path, header: Mapping[str, Any], num_rows: int, *, restart: bool) -> Journal:
        """Open or begin the journal at `path`; what it holds must be of the same header, unless `restart` drops it.

        Raises ConfigError for one of another run, one that is damaged, one that another process writes to, and for a
        file that is no journal, which is left as it is even on `restart`; OutputError where it cannot be written.
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
        """[num_rows]: those that were appended by now."""
        return self._offsets >= 0

    def has(self, row: int) -> bool:
        return bool(self._offsets[row] >= 0)

    def entry(self, row: int) -> Entry:
        """What was appended for a row."""
        if not self.has(row):
            raise RuntimeError(f"row {row} has not been judged")
        line = os.pread(self._file.fileno(), 4096, self._offsets[row])
        while b"\n" not in line:
            line += os.pread(self._file.fileno(), 1 << 16, self._offsets[row] + len(line))
        return of_line(line[: line.index(b"\n")])[1]

    def append(self, entries: Iterable[tuple[int, Entry]]) -> None:
        """Append rows' entries: on return they are on the disk, all of them.

        Raises OutputError where they cannot be written; the journal is then as it was.
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
            is_ours = self._is_at_path()  # or else whoever had it locked has finished, and removed it
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
                f"{self.path} is there and is not the journal of an annotation; remove it, or give another OUT"
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
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self._damaged(1)
        changes = [
            f"{name.replace('_', '-')} ({_shown(found.get(name))}, now {_shown(header.get(name))})"
            for name in (*header, *(found.keys() - header.keys()))
            if found.get(name) != header.get(name)
        ]
        if changes:
            raise ConfigError(
                f"{self.path} was begun with another {', '.join(changes)}; go on as it was begun, give --restart to "
                "drop what it holds, or another OUT"
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
    """A row's line, its end included."""
    kind = "fault" if isinstance(entry, Fault) else "annotation"
    value = entry.reason if isinstance(entry, Fault) else asdict(entry)
    return json.dumps({"row": row, kind: value}).encode() + b"\n"


def of_line(line: bytes) -> tuple[int, Entry]:
    """The row and entry of a line. Raises ValueError, TypeError or KeyError for what is none."""
    fields = json.loads(line)
    entry = Fault(fields["fault"]) if "fault" in fields else Annotation(**fields["annotation"])
    return fields["row"], entry


def open_file(path: Path) -> io.FileIO:
    """A file that is appended to, unbuffered."""
    return io.FileIO(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")


def write_error(path: Path, error: OSError) -> OutputError:
    """What to say where a write has failed."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    mend = "make room" if is_full else "mend that"
    return OutputError(
        f"{path} cannot be written ({error.strerror or error}); {mend} and run the same command again, which goes on "
        "where this one stopped"
    )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return f"{text[:10]}..." if isinstance(value, str) and len(value) == 64 else text
