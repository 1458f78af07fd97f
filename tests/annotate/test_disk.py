"""guardengine annotate: full disks, folders that cannot be written to, and files that must not be written over."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from annotating import ROWS, Files, run, write_lines

from guardengine import ConfigError, OutputError
from guardengine.cli import main

# -- disks -------------------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file grows beyond this size: writes come short, then fail, as on a full disk. Python ignores SIGXFSZ."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def is_written(files: Files, problem: str) -> bool:
    """Annotate. Whether that has succeeded; if not, the error names the problem, and the journal alone is left."""
    try:
        files.run()
    except OutputError as error:
        found = str(error)
    else:
        return True
    assert problem in found
    assert "run the same command again: it continues where this one stopped" in found
    if files.journal.exists() and (left := files.journal.read_bytes()):
        assert left.endswith(b"\n")  # nothing half written
    names = {path.name for path in files.folder.glob("out*")}
    if names != {files.out.name, files.bad.name, files.journal.name}:  # all is there, but not known to last
        assert names <= {files.journal.name}
    return False


def test_files_that_cannot_grow(either: Files) -> None:
    num_done = []
    size_needed = len(either.expected[0])
    for size in range(0, size_needed, 997):
        with file_size_limit(size):
            assert not is_written(either, "make room")
        num_done.append(either.num_journaled())
    assert num_done == sorted(num_done)
    assert num_done[0] == 0
    assert len(set(num_done)) > 5
    assert num_done.count(len(ROWS)) > 5  # it was OUT that did not fit
    either.finish()


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """A file system of this size."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in (".jsonl", ".parquet"):
        (tmp_path / suffix).mkdir()
        files = Files(tmp_path / suffix, suffix)
        with mounted(tmp_path / "disk", 2**18):
            files.folder = tmp_path / "disk"
            files.out = files.folder / f"out{suffix}"
            files.journal, files.bad = Path(f"{files.out}.partial"), Path(f"{files.out}.bad.jsonl")
            ballast = files.folder / "ballast"
            num_done = []
            for room in range(0, 2**17, 2**12):
                ballast.write_bytes(bytes(2**18 - room))
                if is_written(files, os.strerror(errno.ENOSPC)):
                    break
                num_done.append(files.num_journaled())
                arguments = ["--checkpoint", str(files.checkpoint), "--batch-rows", "6", "--quiet"]
                if room == 0:
                    assert main(["annotate", str(files.source), str(files.out), *arguments]) == 2
                    assert "make room and run the same command again" in capsys.readouterr().err
            assert num_done == sorted(num_done)
            assert len(set(num_done)) > 2
            assert num_done.count(len(ROWS)) > 2
            files.check()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_writes_and_syncs_that_fail(files: Files, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    fsync = os.fsync
    num_failures = 0
    for nth in range(1, 100):
        calls = iter(range(nth - 1))

        def fail(descriptor: int, calls: Any = calls) -> None:
            if next(calls, None) is None:
                raise OSError(error, os.strerror(error))
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            if is_written(files, "repair that" if error == errno.EIO else "make room"):
                break
            num_failures += 1
        if num_failures % 3 == 0:  # what was reported as written is there, and only that
            files.run(restart=not files.journal.exists())
            files.check()
            files.out.unlink()
            files.bad.unlink()
    assert num_failures > 2
    files.check()


def test_a_folder_that_is_read_only(files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    if os.geteuid():
        folder.mkdir(mode=0o500)
        with pytest.raises(OutputError, match=r"out.jsonl.partial cannot be written .*give another OUT"):
            files.run(out=folder / "out.jsonl")
        return
    with mounted(folder, 2**18):
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(OutputError, match=r"out.jsonl.partial cannot be written .*give another OUT"):
            files.run(out=folder / "out.jsonl")
        assert not list(folder.iterdir())


# -- places ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["x.jsonl.bad.jsonl", "x.jsonl.partial", "x.jsonl.tmp", "x.jsonl.bad.jsonl.tmp"]
)
def test_an_input_that_would_be_written_over(files: Files, tmp_path: Path, name: str) -> None:
    source = tmp_path / (name if name.endswith(".jsonl") else "in.jsonl")
    place = tmp_path / name
    if place != source:
        place.symlink_to(source)
    write_lines(source, ROWS)
    for restart in (False, True):
        with pytest.raises(ConfigError, match="is a file of the input"):
            run(source, tmp_path / "x.jsonl", files.checkpoint, restart=restart)
    assert source.read_bytes() == files.source.read_bytes()
    assert json.loads(source.read_bytes().splitlines()[0])["prompt"] == "Prompt 0"


@pytest.mark.parametrize(
    ("out", "match"),
    [
        ("out.csv", "must end in .jsonl or .parquet"),
        ("missing/out.jsonl", "is not a folder"),
        ("folder.jsonl", "is a folder"),
        ("in.jsonl", "lies in, the input"),
        ("there.jsonl", "--restart"),
    ],
)
def test_outputs_that_are_refused(files: Files, tmp_path: Path, out: str, match: str) -> None:
    (tmp_path / "there.jsonl").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ConfigError, match=match):
        files.run(out=tmp_path / out)
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    assert files.source.read_bytes().count(b"\n") == len(ROWS)
