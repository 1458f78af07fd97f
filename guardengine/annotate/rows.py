"""Row: one row of an input, as it was read. JsonlSource: rows from files of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardengine.errors import ConfigError

SAMPLE_ROWS = 1000
_BOM = b"\xef\xbb\xbf"
# How files begin that are no lines of UTF-8, and what to do with them.
_OTHER_FORMATS = {
    b"\x1f\x8b": "compressed with gzip; decompress it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it",
    b"PAR1": "Parquet; name it .parquet",
    b"ARROW1": "Arrow; name it .arrow",
    b"\xff\xfe": "UTF-16; convert it to UTF-8",
    b"\xfe\xff": "UTF-16; convert it to UTF-8",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A row, its number counted from 0 over all files.

    record: column -> value; {} where the row could not be read as such. fault: why it could not, as it is, be read;
    None where all is well. raw: the line that it was, without its end. line: its number in `file`, from 1.
    """

    number: int
    record: Mapping[str, Any]
    fault: str | None = None
    raw: bytes | None = None
    file: str | None = None
    line: int | None = None


class JsonlSource:
    """JSON lines: an object a line; blank lines are no rows."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    def num_rows(self) -> int:
        return sum(1 for _ in self._lines())

    def sample(self) -> tuple[list[str], list[Mapping[str, Any]]]:
        """The columns of the first rows, and these. Raises ConfigError where none can be read."""
        columns: dict[str, None] = {}
        rows: list[Mapping[str, Any]] = []
        faults: list[str] = []
        for row in self.rows():
            if row.fault is None:
                columns |= dict.fromkeys(row.record)
                rows.append(row.record)
            else:
                faults.append(f"{row.file}, line {row.line}: {row.fault}")
            if row.number + 1 >= SAMPLE_ROWS:
                break
        if not rows:
            problem = (
                f"none of the first {len(faults)} can be read ({faults[0]})" if faults else "there is none"
            )
            raise ConfigError(f"{self.files[0]}: rows are needed, one JSON object a line, and {problem}")
        return list(columns), rows

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """All rows, in order; `columns` is for sources that can leave others unread."""
        for number, (file, line, raw) in enumerate(self._lines()):
            record, fault = parse_line(raw)
            yield Row(number, record, fault, raw, file.name, line)

    def _lines(self) -> Iterator[tuple[Path, int, bytes]]:
        for path in self.files:
            try:
                with path.open("rb") as file:
                    for number, line in enumerate(file, 1):
                        if number == 1:
                            _check_format(path, line)
                        raw = (line.removeprefix(_BOM) if number == 1 else line).strip(b" \t\r\n")
                        if raw:
                            yield path, number, raw
            except OSError as error:
                raise ConfigError(f"{path} cannot be read ({error})") from error


def _check_format(path: Path, line: bytes) -> None:
    for opening, what in _OTHER_FORMATS.items():
        if line.startswith(opening):
            raise ConfigError(f"{path} is not JSON lines but {what}")


def parse_line(raw: bytes) -> tuple[dict[str, Any], str | None]:
    """A line's object, or {} and why it has none."""
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        return {}, f"not valid UTF-8 at byte {error.start} of the line"
    except RecursionError:
        return {}, "not readable as JSON: nested too deeply"
    except ValueError as error:
        return {}, f"not valid JSON: {error}"
    if not isinstance(value, dict):
        return {}, f"a JSON {type(value).__name__}, not an object"
    return value, None
