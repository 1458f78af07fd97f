"""guardengine annotate: nothing lost and nothing twice, whatever kills a run or changes under it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from annotating import ROWS, FakeGen, Files, write_lines

import guardengine.annotate.journal
import guardengine.annotate.run
from guardengine import ConfigError
from guardengine.annotate.layout import Layout
from guardengine.cli import main

pytestmark = pytest.mark.slow

# -- kills -------------------------------------------------------------------------------------------------


def test_a_kill_at_any_line_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    program = Path(__file__).parents[1] / "support" / "annotate_killed.py"
    done = subprocess.run(
        [sys.executable, "-P", str(program), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(program.parent), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80


def test_the_command_is_killed_twice_and_goes_on(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"prompt": f"Is {i} so? " * 3, "response": f"It is {i}. " * 12} for i in range(160)]
    source, out = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    journal = Path(f"{out}.partial")

    def arguments(out: Path) -> list[str]:
        options = ["--checkpoint", str(checkpoints()), "--threads", "1", "--batch-rows", "4", "--quiet"]
        return ["annotate", str(source), str(out), *options]

    for num_lines in (20, 60):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "guardengine", *arguments(out)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") > num_lines:
                break
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was not killed in time"
        assert not out.exists()
    before = journal.read_bytes().count(b"\n") - 1
    assert 60 <= before < len(rows)
    assert main(arguments(out)) == 0
    assert main(arguments(tmp_path / "whole.jsonl")) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not journal.exists()


def test_a_journal_cut_anywhere_is_gone_on_with(files: Files) -> None:
    files.stop_after(6)
    whole = files.journal.read_bytes()
    header = whole.index(b"\n") + 1
    cuts = {0, 1, 10, header - 2, header - 1, header, header + 1, len(whole) - 1, len(whole)}
    for cut in sorted(cuts | set(range(header, len(whole), 211))):
        files.journal.write_bytes(whole[:cut])
        files.finish()
        files.out.unlink()
        files.journal.write_bytes(whole[:cut] + b"\0" * 512)  # as a file system may leave it
        if cut > header and not whole[:cut].endswith(b"\n"):
            files.finish()
            files.out.unlink()


def test_a_journal_that_was_killed_between_out_and_its_end_is_no_hindrance(either: Files) -> None:
    either.stop_after(4)
    journal = either.journal.read_bytes()
    either.finish()
    either.journal.write_bytes(journal)  # OUT is in its place, and there is a journal still
    either.finish()


def test_a_damaged_journal_is_refused_and_left_alone(files: Files) -> None:
    files.stop_after(3)
    lines = files.journal.read_bytes().splitlines(keepends=True)
    for place, damaged in [
        (2, b"{\n"),
        (2, b"\xff\xfe\n"),
        (2, b'{"row": 1.5, "fault": "x"}\n'),
        (2, b'{"row": true, "fault": "x"}\n'),
        (2, b'{"row": 60, "fault": "x"}\n'),
        (2, b'{"row": -1, "fault": "x"}\n'),
        (2, b'{"row": 1}\n'),
        (2, b'{"row": 1, "annotation": {"risk": "Safe"}}\n'),
        (2, b"[" * 100_000 + b"\n"),
        (0, b'{"format": \n'),
    ]:
        data = b"".join([*lines[:place], damaged, *lines[place + 1 :]])
        files.journal.write_bytes(data)
        with pytest.raises(ConfigError, match=rf"line {place + 1}: damaged; give --restart"):
            files.run()
        assert files.journal.read_bytes() == data
        assert not files.out.exists()
    assert files.run(restart=True).num_resumed == 0
    files.check()


@pytest.mark.parametrize("data", [b"mine, without a line's end", b"mine\n", b'{"form', b'{"a": 1}\n'])
@pytest.mark.parametrize("restart", [False, True])
def test_a_file_that_is_no_journal_is_never_written_to(files: Files, data: bytes, restart: bool) -> None:
    files.journal.write_bytes(data)
    if data == b'{"form':  # what a kill can leave
        files.run(restart=restart)
        return files.check()
    with pytest.raises(ConfigError, match="not the journal of an annotation"):
        files.run(restart=restart)
    assert files.journal.read_bytes() == data


# -- another run than the one that was begun ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"policy": "loose"}, r"another policy \(\"strict\", now \"loose\"\)"),
        ({"debounce": 3}, r"debounce \(2, now 3\)"),
        ({"prefix": "gen_"}, "prefix"),
        ({"limit": 20}, r"limit \(null, now 20\), rows"),
        ({"quantization": "int8"}, "quantization"),
        ({"layout": Layout(prompt="prompt")}, "response-column"),
    ],
)
def test_other_options_are_refused_by_name(files: Files, options: dict[str, Any], match: str) -> None:
    files.stop_after(4)
    before = files.journal.read_bytes()
    with pytest.raises(ConfigError, match=match):
        files.run(**options)
    assert files.journal.read_bytes() == before
    files.run(out=files.folder / "other.jsonl", **options)  # another OUT is another run
    files.finish()


def test_another_input_or_checkpoint_is_refused_by_name(files: Files, tmp_path: Path) -> None:
    files.stop_after(4)
    before, rows = files.journal.read_bytes(), files.source.read_bytes()
    for changed in (rows + b'{"prompt": "more", "response": "x"}\n', rows.replace(b"Yes", b"Not", 1)):
        files.source.write_bytes(changed)
        with pytest.raises(ConfigError, match="begun with another input"):
            files.run()
    files.source.write_bytes(rows)
    (files.checkpoint / "config.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="begun with another checkpoint"):
        files.run()
    (files.checkpoint / "config.json").write_text("{}")
    assert files.journal.read_bytes() == before
    files.finish()


def test_restart_begins_anew_and_keeps_a_finished_out_until_the_end(files: Files) -> None:
    files.run(policy="loose")
    loose = files.out.read_bytes()
    assert loose != files.expected[0]
    with pytest.raises(ConfigError, match="exists already; give --restart"):
        files.run()

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.run(FakeGen(stop), restart=True)
    assert files.out.read_bytes() == loose
    files.finish()  # no --restart any more, or it would begin anew each time


def test_an_input_that_changes_meanwhile_gives_no_output(
    either: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = either.source.read_bytes()

    def change() -> None:
        either.source.write_bytes(rows + b"\n")

    with pytest.raises(ConfigError, match=r"changed while it was annotated; give --restart"):
        either.run(FakeGen(change))
    assert not either.out.exists()
    either.source.write_bytes(rows)

    # While OUT is written: the last moment, when all of it is read.
    entry = guardengine.annotate.journal.Journal.entry

    def change_late(self: Any, row: int) -> Any:
        if row == len(ROWS) - 1:
            change()
        return entry(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(guardengine.annotate.journal.Journal, "entry", change_late)
        with pytest.raises(ConfigError, match=r"changed while it was annotated"):
            either.run(restart=True)
    assert [path.name for path in either.folder.glob("out*")] == [either.journal.name]
    either.source.write_bytes(rows)
    either.finish()


# -- another process ---------------------------------------------------------------------------------------


def test_two_runs_of_one_out_do_not_meet(files: Files) -> None:
    refused = []

    def second() -> None:
        with pytest.raises(ConfigError, match="in use by another process") as caught:
            files.run(restart=len(refused) > 3)
        refused.append(caught)

    files.run(FakeGen(second))
    assert len(refused) > 4
    files.check()


def test_a_run_that_another_has_overtaken_does_not_write_again(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.stop_after(2)
    digest = guardengine.annotate.run.checkpoint_digest

    def overtake(*arguments: Any, **options: Any) -> str:
        monkeypatch.setattr(guardengine.annotate.run, "checkpoint_digest", digest)
        files.finish()
        return digest(*arguments, **options)

    monkeypatch.setattr(guardengine.annotate.run, "checkpoint_digest", overtake)
    with pytest.raises(ConfigError, match="exists already"):
        files.run(policy="loose")
    files.check()
