"""annotate(): annotate a data set with a checkpoint, from the first row or from where an earlier run stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from guardengine._version import __version__
from guardengine.annotate.annotations import Judged, judge_call
from guardengine.annotate.calls import Rows
from guardengine.annotate.data_files import data_files
from guardengine.annotate.digests import Watched, checkpoint_digest, input_digest
from guardengine.annotate.journal import Journal
from guardengine.annotate.jsonl_out import Columns, Source, check_columns
from guardengine.annotate.layout import Layout, choose_layout
from guardengine.annotate.output import Output, write_output
from guardengine.annotate.response_chars import ResponseChars
from guardengine.annotate.rows import JsonlSource
from guardengine.annotate.tables import TableSource, arrow
from guardengine.checkpoint.hub import resolve_checkpoint
from guardengine.engine.engine import Engine
from guardengine.engine.moderator import Moderator
from guardengine.errors import ConfigError
from guardengine.policy import Policy

DEFAULT_WINDOW_ROWS = 2048

Loader = Callable[[Path], AbstractContextManager[Moderator]]
# Judges rows with the checkpoint in a folder, which has a digest. Entries come in any order, one for each row.
Judging = Callable[[Rows, Path, str], AbstractContextManager[Iterable[Judged]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of `annotate`; `guardengine annotate --help` explains each.

    Annotations depend on all of them except window_rows and num_threads, so a run can be continued only with the same
    values.

    Attributes:
        layout: Columns that the user names; columns that are not named are recognized by their names.
        split: The split of a data-set folder.
        policy: "strict" or "loose".
        debounce: See `Policy`.
        prefix: The prefix of the columns that are added.
        limit: Annotate only the first so many rows.
        revision: The revision of the checkpoint on the hub.
        backend: See `Engine.from_pretrained`.
        quantization: See `Engine.from_pretrained`.
        num_threads: See `EngineConfig`.
        window_rows: How many rows are sorted by length together.
    """

    layout: Layout = field(default_factory=Layout)
    split: str | None = None
    policy: str = "strict"
    debounce: int = 2
    prefix: str = "guard_"
    limit: int | None = None
    revision: str | None = None
    backend: str = "auto"
    quantization: str | None = None
    num_threads: int | None = None
    window_rows: int = DEFAULT_WINDOW_ROWS

    def __post_init__(self) -> None:
        if self.policy not in ("strict", "loose"):
            raise ConfigError(f"--policy {self.policy}: choose strict or loose")
        if self.limit is not None and self.limit < 0:
            raise ConfigError(f"--limit {self.limit}: give a number of rows from 0")
        if not 1 <= self.window_rows <= 2**20:
            raise ConfigError(f"--batch-rows {self.window_rows}: give a number from 1 to {2**20}")

    def make_policy(self) -> Policy:
        return Policy.of(self.policy, debounce=self.debounce)


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `annotate`.

    Attributes:
        layout: The columns that were judged.
        num_rows: Rows in the output.
        num_bad: Rows that were not judged.
        num_resumed: Rows that an earlier run had judged.
        num_tokens: Tokens that this run computed.
        seconds: How long this run judged.
        risks: Number of rows by risk.
        as_text: Columns of mixed types, which are JSON text in a Parquet file.
    """

    layout: Layout
    num_rows: int
    num_bad: int
    num_resumed: int
    num_tokens: int
    seconds: float
    risks: dict[str, int]
    as_text: tuple[str, ...] = ()


def annotate(
    input_path: str | Path,
    output_path: str | Path,
    checkpoint: str | Path,
    options: Options | None = None,
    *,
    restart: bool = False,
    progress: bool = False,
    load: Loader | None = None,
    judging: Judging | None = None,
) -> Report:
    """Annotate a data set: JSON lines, Parquet or Arrow files, or a folder of them.

    The output is JSON lines or Parquet, by its suffix. It has all rows and columns of the input in the same order, and
    the added columns.

    Until all rows are judged only the journal beside `output_path` (its name and ".partial") grows. A run that was
    killed, or found no disk space, continues from there when it is started again with the same input, checkpoint and
    options.

    Args:
        input_path: The file or folder to annotate.
        output_path: The file to write, ending in .jsonl or .parquet.
        checkpoint: A checkpoint folder or hub id.
        options: What to judge, and how.
        restart: Drop the journal of an earlier run, and replace a finished output.
        progress: Show progress bars.
        load: Makes the engine for a checkpoint's folder.
        judging: Judges the rows elsewhere than in this process.

    Returns:
        Counts of what was done.

    Raises:
        ConfigError: Something is wrong with the input or the options.
        CheckpointError: The checkpoint cannot be read.
        OutputError: The output cannot be written.
    """
    options = options or Options()
    options.make_policy()  # raises
    given, out = Path(input_path), Path(output_path)
    journal_path = Path(f"{out}.partial")
    _check_output(given, out, journal_path, restart)
    files = data_files(given, options.split)
    _check_apart(files, [*Output(out).places, journal_path])
    watched = Watched(given, files)
    source = _open_source(files, out)
    names, sample = source.sample()
    layout = choose_layout(options.layout, names, sample)
    columns = Columns.with_prefix(options.prefix)
    check_columns(columns, names)
    folder = resolve_checkpoint(checkpoint, options.revision)
    num_rows = source.num_rows()
    if options.limit is not None:
        num_rows = min(num_rows, options.limit)
    header: dict[str, Any] = {
        "version": __version__,
        "input": input_digest(files, given, progress=progress),
        "checkpoint": checkpoint_digest(folder, progress=progress),
        **_recorded(options, layout),
        "rows": num_rows,
    }
    judging = judging or _here(options, load or partial(load_engine, options=options, progress=progress))
    with Journal.open(journal_path, header, num_rows, restart=restart) as journal:
        if journal.is_new and not restart and out.exists():  # another process has just finished it
            journal.remove()
            raise _is_there(out)
        num_resumed, num_tokens, start = journal.num_done, 0, time.perf_counter()
        if num_resumed < num_rows:
            rows = Rows(source, layout, columns, num_rows, options.window_rows, journal.is_done)
            with judging(rows, folder, header["checkpoint"]) as judged:
                start = time.perf_counter()
                num_tokens = _record(journal, judged, num_rows, progress=progress)
        seconds = time.perf_counter() - start

        watched.check()
        written = write_output(
            source, out, layout, columns, journal, num_rows, before_placing=watched.check, progress=progress
        )
        journal.remove()
        risks = dict(journal.counts)
    return Report(layout, num_rows, written.num_bad, num_resumed, num_tokens, seconds, risks, written.as_text)


def _record(journal: Journal, judged: Iterable[Judged], num_rows: int, *, progress: bool) -> int:
    """Append entries to the journal as they come. Returns how many tokens were computed."""
    num_tokens = 0
    with tqdm(
        total=num_rows, initial=journal.num_done, desc="annotate", unit="row", disable=not progress
    ) as bar:
        for entries, num_new in judged:
            journal.append(entries)
            num_tokens += num_new
            bar.set_postfix(tokens=num_tokens, bad=journal.num_faults, refresh=False)
            bar.update(len(entries))
    return num_tokens


def _check_output(given: Path, out: Path, journal: Path, restart: bool) -> None:
    if out.suffix.lower() not in (".jsonl", ".parquet"):
        raise ConfigError(f"{out}: OUT must end in .jsonl or .parquet, which says how it is written")
    if out.is_dir() or not out.parent.is_dir():
        problem = "is a folder" if out.is_dir() else f"cannot be written: {out.parent} is not a folder"
        raise ConfigError(f"{out} {problem}; give a file in a folder that exists")
    place = out.resolve()
    if place == given.resolve() or (given.is_dir() and place.is_relative_to(given.resolve())):
        raise ConfigError(f"{out} is, or lies in, the input {given}; give another OUT")
    if out.exists() and not journal.exists() and not restart:
        raise _is_there(out)


def _is_there(out: Path) -> ConfigError:
    return ConfigError(f"{out} exists already; give --restart to annotate once more, or another OUT")


def _check_apart(files: list[Path], places: list[Path]) -> None:
    """Raise ConfigError when a file of the input is one that is written, such as OUT.bad.jsonl."""
    inputs = {file.resolve() for file in files}
    for place in places:
        if place.resolve() in inputs:
            raise ConfigError(f"{place}, which this OUT needs, is a file of the input; give another OUT")


def _open_source(files: list[Path], out: Path) -> Source:
    is_table = files[0].suffix.lower() in (".parquet", ".arrow")
    if out.suffix.lower() == ".parquet":
        arrow()  # raises here, before anything is judged
    return TableSource(files) if is_table else JsonlSource(files)


def _recorded(options: Options, layout: Layout) -> dict[str, Any]:
    """The options that the header of a journal has, by their names on the command line."""
    values = asdict(options) | {f"{role}_column": name for role, name in asdict(layout).items()}
    for name in ("layout", "window_rows", "num_threads", "revision"):
        del values[name]
    return values


def load_engine(folder: Path, options: Options, *, progress: bool = False) -> Engine:
    """The engine for these options."""
    return Engine.from_pretrained(
        folder,
        backend=options.backend,
        quantization=options.quantization,
        num_threads=options.num_threads,
        progress=progress,
    )


def _here(options: Options, load: Loader) -> Judging:
    """Judge rows in this process, one call after the other."""

    @contextmanager
    def judging(rows: Rows, folder: Path, checkpoint: str) -> Iterator[Iterator[Judged]]:
        policy, chars = options.make_policy(), ResponseChars(folder)
        with load(folder) as engine:
            yield (judge_call(engine, call, policy, chars) for call in rows.calls())

    return judging
