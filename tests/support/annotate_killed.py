"""Annotates, is killed by SIGKILL at a line of guardengine/annotate/, and once more, and goes on: for many lines.

    python -P annotate_killed.py FOLDER

A program of its own, so that every run is a fork of a process that has all imported and no threads. Prints how many
runs were killed; fails at the first OUT that differs from that of a run that was left alone.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from annotating import FakeGen, checkpoint_folder, run, write_lines

import guardengine.annotate.run
from guardengine.annotate.journal import Journal

PACKAGE = str(Path(guardengine.annotate.run.__file__).parent)
# Where files are written, every line that runs is chosen, at its first or last time; elsewhere some are, at random.
WRITING = {".jsonl": ("journal.py", "output.py"), ".parquet": ("output.py",)}
NUM_ELSEWHERE = 8
ROWS: list[Any] = [{"prompt": f"Prompt {'na ' * (i * 7 % 11)}{i}", "i": i} for i in range(24)]
ROWS[5], ROWS[17], ROWS[20] = {"prompt": None}, b'{"prompt": "torn', {"prompt": "refuse"}
Point = tuple[str, int]


def forked(work: Callable[[], None]) -> bool:
    """Do the work in a fork of this process. Returns whether that was killed; raises where it has failed."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def traced(work: Callable[[], None], on_line: Callable[[Point], None]) -> None:
    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            on_line((Path(frame.f_code.co_filename).name, frame.f_lineno))
        return trace

    sys.settrace(trace)
    work()
    sys.settrace(None)


def killed_at(work: Callable[[], None], index: int) -> bool:
    """Whether the work was killed: there are that many lines."""
    lines = iter(range(index, -1, -1))

    def count(_: Point) -> None:
        if next(lines) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return forked(lambda: traced(work, count))


def chosen(lines: list[Point], writing: tuple[str, ...], rng: random.Random) -> list[int]:
    """Of the lines that a run goes through, those at which another one is to be killed."""
    times: dict[Point, list[int]] = {}
    for index, point in enumerate(lines):
        if point[0] in writing:
            times.setdefault(point, []).append(index)
    places = {rng.choice((found[0], found[-1])) for found in times.values()}
    return sorted(places | {rng.randrange(len(lines)) for _ in range(NUM_ELSEWHERE)})


def kill_often(folder: Path, suffix: str, rng: random.Random) -> int:
    """Returns how many runs were killed."""
    checkpoint = checkpoint_folder(folder / "checkpoint")
    source = write_lines(folder / "in.jsonl", ROWS)
    work_folder = folder / "work"
    out, journal = work_folder / f"out{suffix}", work_folder / f"out{suffix}.partial"

    def annotate() -> None:
        num_done = max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0
        gen = FakeGen()
        report = run(source, out, checkpoint, gen, window_rows=5)
        assert report.num_bad == 3
        assert report.num_resumed == num_done
        assert len(ROWS) - 3 <= report.num_resumed + sum(gen.calls) <= len(ROWS)  # three rows are bad

    def fresh() -> None:
        shutil.rmtree(work_folder, ignore_errors=True)
        work_folder.mkdir()

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in work_folder.iterdir()}

    fresh()
    lines: list[Point] = []
    traced(annotate, lines.append)
    expected = files()
    assert len(expected) == 2

    of_records = {line for *_, line in Journal._record.__code__.co_lines()}
    last_record = max(
        i for i, (name, line) in enumerate(lines) if name == "journal.py" and line in of_records
    )

    places = chosen(lines, WRITING[suffix], rng)
    num_killed = 0
    for index in places:
        fresh()
        num_killed += killed_at(annotate, index)
        if files() == expected:  # killed when all was done: OUT is there, and is not written again
            continue
        if index > last_record and not out.exists():  # all rows are judged, and are not to be judged again
            assert journal.read_bytes().count(b"\n") == 1 + len(ROWS)
        if out.exists():
            assert files()[out.name] == expected[out.name]
        if rng.random() < 0.5:
            num_killed += killed_at(annotate, rng.randrange(len(lines)))
        if files() != expected:
            forked(annotate)
        assert files() == expected, (lines[index], sorted(files()))
    assert num_killed >= len(places)
    return num_killed


def main() -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}", file=sys.stderr)
    rng = random.Random(seed)
    gc.freeze()  # or every fork's first collection would copy all pages
    gc.disable()
    print(sum(kill_often(Path(sys.argv[1]), suffix, rng) for suffix in WRITING))


if __name__ == "__main__":
    main()
