"""guardengine annotate: hostile and mixed files, Parquet and Arrow kept as they were, data-set folders."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotating import GUARD, FakeGen, checkpoint_folder, guard_values, read_lines, run, write_lines

from guardengine import ConfigError
from guardengine.annotate.layout import Layout


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    return checkpoint_folder(tmp_path / "fake")


def write_parquet(path: Path, table: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def write_arrow(path: Path, table: Any, *, is_stream: bool = True, batch_rows: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    make = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return path


def invalid_utf8(values: list[bytes]) -> Any:
    """Text as a careless writer leaves it."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def everything() -> Any:
    """Columns of all kinds."""
    return pa.table(
        {
            "prompt": ["a", "b", "c"],
            "large": pa.array(["x", "y", None], pa.large_string()),
            "dictionary": pa.array(["x", "y", "x"]).dictionary_encode(),
            "nested": pa.array([[{"a": 1, "b": ["q"]}], None, []]),
            "map": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
            "ns": pa.array([1, 2, None], pa.timestamp("ns")),
            "utc": pa.array([1, 2, 3], pa.timestamp("us", tz="UTC")),
            "decimal": pa.array([decimal.Decimal("1.10"), None, None]),
            "bytes": pa.array([b"\xff", b"", None]),
            "fixed": pa.array([[1, 2], [3, 4], None], pa.list_(pa.int32(), 2)),
            "null": pa.nulls(3),
            "uint64": pa.array([2**64 - 1, 1, 2], pa.uint64()),
            "float": pa.array([1.5, float("nan"), None], pa.float32()),
            "time": pa.array([datetime.time(1, 2)] * 3),
        }
    )


# -- lines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (gzip.compress(b'{"prompt": "a"}\n', mtime=0), "compressed with gzip; decompress it"),
        (b"\x28\xb5\x2f\xfd\x04\x00", "compressed with zstd"),
        (b"PAR1\x15\x04", r"is not JSON lines but Parquet; name it \.parquet"),
        ('{"prompt": "a"}\n'.encode("utf-16"), "UTF-16; convert it"),
        (b"", "must have rows|has no rows"),
        (b"\n \n\r\n", "must have rows|has no rows"),
        (b"hello\nworld\n", "none of the first 2 can be read .*line 1: not valid JSON"),
        (b'{"prompt": "\xff"}\n', "not valid UTF-8 at byte 12"),
        (b'{"id": 1}\n', "none of the columns 'id' is known"),
    ],
)
@pytest.mark.parametrize("layout", [Layout(), Layout(prompt="id")])
def test_files_that_are_no_json_lines(
    fake: Path, tmp_path: Path, data: bytes, match: str, layout: Layout
) -> None:
    (tmp_path / "in.jsonl").write_bytes(data)
    if layout.prompt and b'"id"' in data:
        assert run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", fake, layout=layout).num_bad == 1
        return
    with pytest.raises(ConfigError, match=match):
        run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", fake, layout=layout)
    assert not list(tmp_path.glob("out*"))


def test_lines_stay_as_they_are_but_for_the_columns_added(fake: Path, tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"prompt":"byte order mark"}',
        b'  {"prompt" : "spaces" }\t\r',
        b'{"prompt": "a", "x": 1.0, "y": 1e400, "z": NaN, "big": 99999999999999999999999999}',
        b'{"prompt": "twice", "prompt": "b"}',
        '{"prompt": "\u2028 \x85 \ufeff"}'.encode(),
        b'{"prompt": "NUL \\u0000", "lone": 1, "s": "\\/"}',
        b'{"prompt": "' + b"z" * 1_000_000 + b'"}',
        b'{"prompt": "long", "x": "' + b"y" * 20_000_000 + b'"}',
        b'{"prompt": "deep", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"prompt": "", "x": 1.0}',
        b'{"prompt": "no end"}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    report = run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", fake)
    assert report.num_bad == 1
    found = (tmp_path / "out.jsonl").read_bytes().split(b"\n")
    assert found.pop() == b""
    for line, before in zip(found, lines, strict=True):
        line.decode()
        before = before.removeprefix(b"\xef\xbb\xbf").strip()[:-1].rstrip()
        assert line.startswith(before + b', "guard_risk": ')
        assert list(json.loads(line))[-5:] == GUARD


def test_bad_lines_among_good_ones_keep_their_places(fake: Path, tmp_path: Path) -> None:
    lines = [b'{"prompt": "a"}'] * 1001 + [
        b'{"prompt": "a", "guard_risk": "\\ud800", "x": "\\ud800", "y": NaN}',
        b'{"prompt": "raw \x00"}',
        b'{"prompt": "ok", "x": ' + b"9" * 5000 + b"}",
        b'{"prompt": "torn',
    ]
    for suffix in (".jsonl", ".parquet"):
        (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
        report = run(tmp_path / "in.jsonl", tmp_path / f"out{suffix}", fake)
        assert report.num_bad == 4
        bad = read_lines(tmp_path / f"out{suffix}.bad.jsonl")
        assert [line["line"] for line in bad] == [1002, 1003, 1004, 1005]
        assert [line["row"] for line in bad] == [1001, 1002, 1003, 1004]
        assert "has a column 'guard_risk' already" in bad[0]["reason"]
    (tmp_path / "out.jsonl").read_text("utf-8")
    found = read_lines(tmp_path / "out.jsonl")
    assert found[1001] == {"prompt": "a", "x": "\ud800", "y": None, **dict.fromkeys(GUARD)}
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["guard_risk"] for row in rows] == [row["guard_risk"] for row in found]


def test_columns_of_mixed_types_become_text_in_parquet(fake: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "mixed": 1, "number": 1, "large": 2**53 + 1, "flag": True, "empty": {}, "list": [1]},
        {"prompt": "b", "mixed": "t", "number": 1.5, "large": 0.5, "flag": 1, "list": ["x"]},
        {"prompt": "c", "mixed": {"q": [None]}, "late": "x", "huge": 10**30},
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    report = run(source, tmp_path / "out.parquet", fake)
    assert report.as_text == ("empty", "flag", "huge", "large", "list", "mixed")
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    for row, line in zip(found, rows, strict=True):
        for name, value in line.items():
            held = row[name]
            assert (json.loads(held) if name in report.as_text else held) == value
        assert all(row[name] is None for name in {*rows[0], "late", "huge"} - line.keys())


# -- tables ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["in.parquet", "in.arrow", "file.arrow"])
def test_tables_keep_their_columns_types_and_order(fake: Path, tmp_path: Path, name: str) -> None:
    table = pa.concat_tables([everything()] * 2000).combine_chunks()  # more than a batch
    table = table.append_column("n", pa.array(range(len(table))))
    table = table.replace_schema_metadata({"mine": "yes"})
    if name == "in.parquet":
        source = write_parquet(tmp_path / name, table)
    else:
        source = write_arrow(tmp_path / name, table, is_stream=name == "in.arrow", batch_rows=700)
    table = pq.read_table(write_parquet(tmp_path / "as.parquet", table))  # with Parquet's names of list items
    run(source, tmp_path / "out.parquet", fake)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.column_names == [*table.column_names, *GUARD]
    kept = found.select(table.column_names)
    assert kept.schema.equals(table.schema, check_metadata=True)
    for column in table.column_names:
        if column != "float":  # where NaN is not NaN
            assert kept[column].combine_chunks().equals(table[column].combine_chunks()), column
    assert len({json.dumps(scores) for scores in found["guard_scores"].to_pylist()}) == 3


def test_tables_as_lines(fake: Path, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", everything())
    assert run(source, tmp_path / "out.jsonl", fake).num_bad == 0
    first, second, _ = read_lines(tmp_path / "out.jsonl")
    assert list(first) == [*everything().column_names, *GUARD]
    assert first["ns"] == "1970-01-01T00:00:00.000000001"  # which Python's datetime does not hold
    assert first["utc"] == "1970-01-01T00:00:00.000001+00:00"
    assert first["nested"] == [{"a": 1, "b": ["q"]}]
    assert first["decimal"] == "1.10"
    assert first["bytes"] == "/w=="
    assert first["uint64"] == 2**64 - 1
    assert second["float"] is None


@pytest.mark.parametrize(
    ("column", "bad"), [("large", {2}), ("dictionary", set()), ("bytes", {0, 1, 2}), ("null", {0, 1, 2})]
)
def test_text_in_columns_of_other_types(fake: Path, tmp_path: Path, column: str, bad: set[int]) -> None:
    source = write_parquet(tmp_path / "in.parquet", everything())
    run(source, tmp_path / "out.parquet", fake, layout=Layout(prompt=column))
    risks = pq.read_table(tmp_path / "out.parquet")["guard_risk"].to_pylist()
    assert {index for index, risk in enumerate(risks) if risk is None} == bad


def test_text_that_is_no_utf8(fake: Path, tmp_path: Path) -> None:
    values = [b"ok", b"\xff\xfe", b"fine"]
    table = pa.table({"prompt": invalid_utf8(values), "id": [1, 2, 3]})
    source = write_parquet(tmp_path / "in.parquet", table)
    for suffix in (".parquet", ".jsonl"):
        assert run(source, tmp_path / f"out{suffix}", fake).num_bad == 1
        (bad,) = read_lines(tmp_path / f"out{suffix}.bad.jsonl")
        assert (bad["row"], bad["reason"]) == (1, "column 'prompt' is not valid UTF-8")
    kept = pq.read_table(tmp_path / "out.parquet")["prompt"].cast(pa.binary()).to_pylist()
    assert kept == values  # as it was
    found = read_lines(tmp_path / "out.jsonl")
    assert found[1]["prompt"] == "\ufffd\ufffd"
    assert [row["guard_risk"] is None for row in found] == [False, True, False]


def test_tables_that_are_refused(fake: Path, tmp_path: Path) -> None:
    table = pa.table({"prompt": ["x" * 100] * 5000})
    whole = write_parquet(tmp_path / "in.parquet", table).read_bytes()
    damaged = bytearray(whole)
    damaged[4:44] = b"\xff" * 40  # the header of the first page
    names = ["prompt", "k", "k"]
    twice = pa.Table.from_arrays([pa.array(["a"])] * 3, names=names)
    stream = write_arrow(tmp_path / "in.arrow", table, batch_rows=1000).read_bytes()
    between = stream.index(b"\xff\xff\xff\xff", len(stream) // 2)  # where another batch begins
    cases: list[tuple[str, bytes, str]] = [
        *(("x.parquet", whole[:cut], "cannot be read") for cut in (0, 3, 8, len(whole) // 2, len(whole) - 1)),
        ("x.parquet", bytes(damaged), "cannot be read"),
        ("x.parquet", b'{"prompt": "a"}\n', "cannot be read"),
        *(("x.arrow", stream[:cut], "cannot be read|has no end") for cut in (0, 5, 999, len(stream) - 1)),
        ("x.arrow", stream[:between], "has no end mark, so rows may be missing"),
        ("x.arrow", stream[:-8], "has no end"),
        (
            "x.parquet",
            write_parquet(tmp_path / "twice.parquet", twice).read_bytes(),
            "several columns named 'k'",
        ),
        (
            "x.parquet",
            write_parquet(tmp_path / "no.parquet", table.slice(0, 0)).read_bytes(),
            "must have rows|has no rows",
        ),
    ]
    for name, data, match in cases:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=match):
            run(tmp_path / name, tmp_path / "out.parquet", fake)
        # Damage further in is found when all before it was judged.
        assert {path.name for path in tmp_path.glob("out*")} <= {"out.parquet.partial"}


# -- folders -----------------------------------------------------------------------------------------------


def test_parts_of_several_schemas(fake: Path, tmp_path: Path) -> None:
    parts = {
        "1": pa.table({"prompt": ["a"], "x": pa.array([1], pa.int32()), "t": ["u"]}),
        "2": pa.table({"x": [1.5], "prompt": pa.array(["b"], pa.large_string()), "more": [["m"]]}),
        "3": pa.table({"other": ["no prompt"]}),
        "4": pa.table({"prompt": pa.array([], pa.string())}),
    }
    for name, table in parts.items():
        write_parquet(tmp_path / f"in/part-{name}.parquet", table)
    report = run(tmp_path / "in", tmp_path / "out.parquet", fake)
    assert (report.num_rows, report.num_bad) == (3, 1)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.column_names == ["prompt", "x", "t", "more", "other", *GUARD]
    assert found["prompt"].to_pylist() == ["a", "b", None]
    assert found["x"].to_pylist() == [1.0, 1.5, None]


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ((pa.array([1]), pa.array(["t"])), "columns of different types .*x has incompatible types"),
        ((pa.array([1] * 5000 + [2**60 + 1]), pa.array([1.5])), "column 'x' is int64, and elsewhere double"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_judged(
    fake: Path, tmp_path: Path, values: tuple[Any, Any], match: str
) -> None:
    for number, value in enumerate(values):
        write_parquet(tmp_path / f"in/{number}.parquet", pa.table({"prompt": ["a"] * len(value), "x": value}))
    gen = FakeGen()
    with pytest.raises(ConfigError, match=match):
        run(tmp_path / "in", tmp_path / "out.parquet", fake, gen)
    assert not gen.calls


def test_lines_of_several_files(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_lines(tmp_path / "in/a.jsonl", [{"prompt": "a"}, b"{"])
    write_lines(tmp_path / "in/b.jsonl", [{"x": 1}, {"prompt": "b", "x": [2]}])
    assert run(tmp_path / "in", tmp_path / "out.jsonl", fake).num_bad == 2
    assert [row.get("prompt") for row in read_lines(tmp_path / "out.jsonl")] == ["a", None, None, "b"]
    bad = read_lines(tmp_path / "out.jsonl.bad.jsonl")
    assert [(line["row"], line["file"], line["line"]) for line in bad] == [
        (1, "a.jsonl", 2),
        (2, "b.jsonl", 1),
    ]
    (tmp_path / "in/c.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match="several formats"):
        run(tmp_path / "in", tmp_path / "out2.jsonl", fake)


def test_snapshots_of_the_hub(fake: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    blob = write_parquet(tmp_path / "blobs/1", pa.table({"prompt": ["b"]}))
    write_parquet(hub / "data/train-00000-of-00002.parquet", pa.table({"prompt": ["a"]}))
    (hub / "data/train-00001-of-00002.parquet").symlink_to(blob)  # as its cache has them
    write_parquet(hub / "data/test-00000-of-00001.parquet", pa.table({"prompt": ["t"]}))
    write_parquet(hub / ".cache/train.parquet", pa.table({"prompt": ["no"]}))
    (hub / "README.md").write_text("---\n---\n")
    (hub / "dataset_info.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"several splits \(test, train\); choose one with --split"):
        run(hub, tmp_path / "out.jsonl", fake)
    with pytest.raises(ConfigError, match="no such split; it has test, train"):
        run(hub, tmp_path / "out.jsonl", fake, split="dev")
    with pytest.raises(ConfigError, match="lies in, the input"):
        run(hub, hub / "out.jsonl", fake, split="train")
    run(hub, tmp_path / "out.jsonl", fake, split="train")
    assert [row["prompt"] for row in read_lines(tmp_path / "out.jsonl")] == ["a", "b"]
    write_parquet(hub / "german/train.parquet", pa.table({"prompt": ["a"]}))
    with pytest.raises(ConfigError, match=r"data files in several folders \(data, german\)"):
        run(hub, tmp_path / "out2.jsonl", fake, split="train")


def test_folders_of_save_to_disk(fake: Path, tmp_path: Path) -> None:
    """As datasets writes them: dataset_dict.json, and for each split state.json, which names the files."""
    features = {"prompt": {"dtype": "string", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    train = tmp_path / "saved/train"
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name in [*names, "cache-1234.arrow"]:
        write_arrow(train / name, pa.table({"prompt": [name]}).replace_schema_metadata(metadata))
    (train / "dataset_info.json").write_text(json.dumps({"features": features}))
    (train / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train"]}')
    for given, out in ((tmp_path / "saved", "1"), (train, "2")):
        run(given, tmp_path / f"{out}.parquet", fake)
        found = pq.read_table(tmp_path / f"{out}.parquet")
        assert found["prompt"].to_pylist() == names
        known = json.loads(found.schema.metadata[b"huggingface"])["info"]["features"]
        assert list(known) == ["prompt", *GUARD]
        assert known["guard_first_flag_token"] == {"dtype": "int64", "_type": "Value"}
    (train / names[1]).unlink()
    with pytest.raises(ConfigError, match=r"no such file, but .*state.json names it"):
        run(train, tmp_path / "3.jsonl", fake)
    (train / "state.json").write_text(
        '{"_data_files": [], "_indices_files": [{"filename": "indices.arrow"}]}'
    )
    with pytest.raises(ConfigError, match="save it again"):
        run(train, tmp_path / "3.jsonl", fake)


# -- columns of our names ----------------------------------------------------------------------------------


def test_columns_that_are_there_already_are_not_written_over(fake: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    run(tmp_path / "in.jsonl", tmp_path / "once.parquet", fake)
    for out in ("twice.jsonl", "twice.parquet"):
        with pytest.raises(ConfigError, match="column 'guard_risk' already; choose another --prefix"):
            run(tmp_path / "once.parquet", tmp_path / out, fake)
        run(tmp_path / "once.parquet", tmp_path / out, fake, prefix="second_", policy="loose")
    (row, _) = read_lines(tmp_path / "twice.jsonl")
    assert list(row) == ["prompt", *GUARD, *(name.replace("guard_", "second_") for name in GUARD)]
    assert guard_values(row)[2] == row["second_scores"]
