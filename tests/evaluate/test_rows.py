"""Rows of evaluate's files: the published format, and what is wrong with a row, by file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from labelled_rows import PLAIN, USER, record, write

from guardengine.errors import ConfigError, InvalidText
from guardengine.evaluate.rows import BadRows, read_rows


def test_rows_of_the_published_format(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        record(
            USER, PLAIN, unique_id=1, source="x", unsafe_start_index=3, unsafe_end_index=9, input_ids=[1, 2]
        ),
        "",
        record(USER, label="Safe", unsafe_start_index=None, unsafe_end_index=float("nan"), input_ids=None),
        {"messages": [USER], "label": "Safe", "unsafe_start_index": 2.0, "unsafe_end_index": 2},
    )
    first, second, third = read_rows(file, BadRows())
    assert (first.is_unsafe, first.span, first.token_ids) == (True, (3, 9), [1, 2])
    assert first.messages == [USER, PLAIN]
    assert (second.is_unsafe, second.span, second.token_ids) == (False, None, None)
    assert second.where == f"{file}, line 3"
    assert third.span == (2, 2)
    assert len(read_rows(file, BadRows(), max_rows=2)) == 2


def test_parquet_has_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [
        record(USER, PLAIN, unsafe_start_index=3, unsafe_end_index=9, input_ids=[1, 2]),
        record(USER, label="Safe", unsafe_start_index=None, unsafe_end_index=None, input_ids=None),
    ]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    lines = read_rows(write(tmp_path / "a.jsonl", *records), BadRows())
    rows = read_rows(tmp_path / "a.parquet", BadRows())
    for line, found in zip(lines, rows, strict=True):
        assert found.messages == line.messages
        assert (found.is_unsafe, found.span, found.token_ids) == (line.is_unsafe, line.span, line.token_ids)
    assert rows[1].where.endswith("a.parquet, row 2")
    (tmp_path / "b.parquet").write_bytes(b"PAR0")
    with pytest.raises(ConfigError, match=r"b\.parquet cannot be read"):
        read_rows(tmp_path / "b.parquet", BadRows())


BAD = [
    ("{", "not JSON"),
    ("[1]", "not an object"),
    ('{"label": "Safe"}', '"message" is None'),
    ('{"message": [], "label": "Safe"}', '"message" is'),
    ('{"message": ["x"], "label": "Safe"}', '"message" is'),
    ('{"message": [{}], "label": "unsafe"}', "\"label\" is 'unsafe'"),
    ('{"message": [{}], "label": ["Safe"]}', '"label" is'),
    ('{"message": [{}], "label": "Safe", "unsafe_start_index": 3}', "None"),
    (
        '{"message": [{}], "label": "Safe", "unsafe_start_index": 3, "unsafe_end_index": 2}',
        "unsafe_end_index 2",
    ),
    ('{"message": [{}], "label": "Safe", "unsafe_start_index": -1, "unsafe_end_index": 2}', "-1"),
    ('{"message": [{}], "label": "Safe", "unsafe_start_index": 1.5, "unsafe_end_index": 2}', "1.5"),
    ('{"message": [{}], "label": "Safe", "unsafe_start_index": 1, "unsafe_end_index": Infinity}', "inf"),
    ('{"message": [{}], "label": "Safe", "unsafe_start_index": "a", "unsafe_end_index": 2}', "'a'"),
    ('{"message": [{}], "label": "Safe", "input_ids": "x"}', '"input_ids"'),
]


@pytest.mark.parametrize(("line", "says"), BAD)
def test_a_bad_row_is_named(tmp_path: Path, line: str, says: str) -> None:
    file = write(tmp_path / "a.jsonl", record(USER), line)
    with pytest.raises(InvalidText) as error:
        read_rows(file, BadRows())
    assert str(error.value).startswith(f"{file}, line 2: ")
    assert says in str(error.value)


def test_so_many_bad_rows_are_left_out_and_one_more_is_not(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", "{", record(USER), "[]")
    bad_rows = BadRows(allowed=2)
    assert len(read_rows(file, bad_rows)) == 1
    assert [reason.partition(":")[0] for reason in bad_rows.reasons] == [f"{file}, line 1", f"{file}, line 3"]
    with pytest.raises(InvalidText, match=r"line 3: .* 1 bad rows are allowed"):
        read_rows(file, BadRows(allowed=1))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl", BadRows())
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_rows(tmp_path / "latin.jsonl", BadRows())
    with pytest.raises(ConfigError, match="no usable rows"):
        read_rows(write(tmp_path / "empty.jsonl", ""), BadRows())
