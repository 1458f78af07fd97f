"""guardengine annotate: rows that cannot be judged stay, with nulls, and are reported with the reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from annotating import (
    GUARD,
    FakeGen,
    checkpoint_folder,
    guard_values,
    open_engine,
    read_lines,
    run,
    write_lines,
)

from guardengine import Engine, Overloaded
from guardengine.cli import main


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    yield from open_engine(checkpoint)


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    return checkpoint_folder(tmp_path / "fake")


GOOD = {"prompt": "Good day", "response": "Good day to you"}
BAD: list[tuple[Any, str]] = [
    ({"response": "no prompt"}, "there is no column 'prompt'"),
    ({"prompt": None, "response": "x"}, "column 'prompt' is null"),
    ({"prompt": "x", "response": None}, "column 'response' is null"),
    ({"prompt": "", "response": "x"}, "column 'prompt' is empty"),
    ({"prompt": "x", "response": " \n"}, "column 'response' is empty"),
    ({"prompt": 7, "response": "x"}, "column 'prompt' is int, not text"),
    ({"prompt": ["x"], "response": "x"}, "column 'prompt' is list, not text"),
    (b'{"prompt": "\\ud800", "response": "x"}', "lone surrogate at character 0"),
    (b'{"prompt": "\xff\xfe", "response": "x"}', "not valid UTF-8 at byte 12"),
    (b'{"prompt": "x", "respo', "not valid JSON"),
    (b"[1, 2]", "a JSON list, not an object"),
    (b'"text"', "a JSON str, not an object"),
    (b"[" * 100_000, "nested too deeply"),
    ({"prompt": "refuse"}, "there is no column 'response'"),
    ({"prompt": "x", "response": "refuse"}, "messages[0]: refused"),
    ({"prompt": "x", "response": "endless"}, "exceeds max_model_len=99"),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_bad_rows_are_kept_and_reported_and_fail_alone(fake: Path, tmp_path: Path, suffix: str) -> None:
    rows: list[Any] = [GOOD] * 5
    for bad, _ in BAD:
        rows += [bad, b"", GOOD]  # blank lines are no rows
    source, out = write_lines(tmp_path / "in.jsonl", rows), tmp_path / f"out{suffix}"
    report = run(source, out, fake)
    if suffix == ".jsonl":
        found = read_lines(out)
    else:
        import pyarrow.parquet

        found = pyarrow.parquet.read_table(out).to_pylist()
    assert report.num_bad == len(BAD)
    assert report.num_rows == len(found) == 5 + 2 * len(BAD)
    reported = read_lines(tmp_path / f"out{suffix}.bad.jsonl")
    assert [line["row"] for line in reported] == list(range(5, len(found), 2))
    for line, (bad, reason) in zip(reported, BAD, strict=True):
        assert reason in line["reason"], bad
        assert line["line"] == 6 + 3 * ((line["row"] - 5) // 2)
        assert line["excerpt"]
        row = found[line["row"]]
        assert guard_values(row) == [None] * 5
        if suffix == ".jsonl" and isinstance(bad, dict):
            assert {name: row[name] for name in bad if name not in GUARD} == {
                name: value for name, value in bad.items() if name not in GUARD
            }
    good = [row for row in found if row["guard_risk"] is not None]
    assert len(good) == 5 + len(BAD)
    assert len({json.dumps(guard_values(row)) for row in good}) == 1


def test_the_engines_own_refusals(engine: Engine, checkpoint: Path, tmp_path: Path) -> None:
    def chat(*turns: tuple[str, str]) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    rows = [
        chat(("user", "Hello")),
        chat(("user", "x" * 1_000_000)),
        chat(("assistant", "no prompt")),
        chat(("user", "Hello"), ("narrator", "Meanwhile")),
        chat(("user", "Hello"), ("system", "unread")),
        chat(("user", "Hello"), ("assistant", "dropped <think>a</think> b </think> c")),
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "", "tool_calls": [1]},
            ]
        },
        {"messages": []},
        {"messages": ["Hello"]},
        chat(("user", "Hello"), ("assistant", "Good day")),
    ]
    report = run(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", checkpoint, engine)
    found = read_lines(tmp_path / "out.jsonl")
    judged = [index for index, row in enumerate(found) if row["guard_risk"] is not None]
    assert judged == [0, 10]
    assert report.num_bad == 9
    reasons = [line["reason"] for line in read_lines(tmp_path / "out.jsonl.bad.jsonl")]
    for reason, part in zip(
        reasons,
        (
            *(
                "cannot fit into 512 tokens",
                "role 'user'",
                "'narrator'",
                "system message",
                "leaves out a part",
            ),
            *("list, not text", "'tool_calls'", "an empty list", "is str, not an object"),
        ),
        strict=True,
    ):
        assert part in reason
        assert "conversations[" not in reason


def test_other_errors_are_not_the_rows(fake: Path, tmp_path: Path) -> None:
    def overload() -> None:
        raise Overloaded("no room")

    source = write_lines(tmp_path / "in.jsonl", [GOOD] * 3)
    with pytest.raises(Overloaded):
        run(source, tmp_path / "out.jsonl", fake, FakeGen(overload))
    assert not (tmp_path / "out.jsonl").exists()
    assert run(source, tmp_path / "out.jsonl", fake).num_rows == 3


@pytest.mark.slow
def test_the_exit_status_counts_bad_rows(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [GOOD, {"prompt": "x"}, b"{", GOOD])
    arguments = ["annotate", str(source), str(tmp_path / "out.jsonl"), "--checkpoint", str(checkpoint)]
    arguments += ["--threads", "1", "--quiet"]
    for allowed, status in (("1", 1), ("2", 0)):
        assert main([*arguments, "--restart", "--allow-bad-rows", allowed]) == status
        assert "2 rows were not judged" in capsys.readouterr().err
        assert len(read_lines(tmp_path / "out.jsonl.bad.jsonl")) == 2
    assert main([*arguments, "--restart", "--allow-bad-rows", "-1"]) == 2
    assert "--allow-bad-rows -1" in capsys.readouterr().err
    write_lines(source, [GOOD])
    assert main([*arguments, "--restart"]) == 0
    assert not (tmp_path / "out.jsonl.bad.jsonl").exists()  # the report of a run that is no more
