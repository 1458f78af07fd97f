"""Row: one row of an input. JsonlSource: the rows of files of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardengine.errors import ConfigError

SAMPLE_ROWS = 1000
_BOM = b"\xef\xbb\xbf"
# The first bytes of files in other formats, and what to do with such a file.
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
    """One row of an input.

    Attributes:
        number: Its number, from 0, over all files.
        record: Column -> value; {} where the row could not be parsed.
        fault: What is wrong with the row, None where it is valid.
        raw: The line of the file, without its line break.
        file: The name of the file.
        line: The number of the line in the file, from 1.
    """

    number: int
    record: Mapping[str, Any]
    fault: str | None = None
    raw: bytes | None = None
    file: str | None = None
    line: int | None = None


class JsonlSource:
    """The rows of JSON lines: one object a line. Blank lines are not rows."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    def num_rows(self) -> int:
        return sum(1 for _ in self._lines())

    def sample(self) -> tuple[list[str], list[Mapping[str, Any]]]:
        """The columns of the first rows, and these rows. Raises ConfigError when none can be read."""
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
            raise ConfigError(f"{self.files[0]} must have rows, one JSON object a line: {problem}")
        return list(columns), rows

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """All rows, in order. columns: of no effect here; other sources read only these."""
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
    """The object in a line and None, or {} and what is wrong with the line."""
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
