"""replay(): run the model again over everything in an audit log, and compare its logits with the recorded ones.

On the cpu backend, with the instruction set of the log, logits must be the same bits, because they depend only on a
stream's tokens. On other backends they are compared within a tolerance. Verdicts must follow from the recorded labels.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from guardengine.core.feeds import Feed
from guardengine.core.state import Wanted
from guardengine.core.whole_streams import run_feeds
from guardengine.engine.engine import Engine
from guardengine.errors import CheckpointError, ConfigError
from guardengine.policy import Policy
from guardengine.records.audit_log import classes_record
from guardengine.records.audit_reader import AuditReader, Difference, Rerun, check_start, parse_line
from guardengine.records.codec import logits_record, read_logits

logger = logging.getLogger("guardengine")

# Where bits cannot agree: several times the largest difference that another order of addition was measured to make.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}
_STREAMS_AT_A_TIME = 64
_TOKENS_AT_A_TIME = 32_768
_MAX_LINE_BYTES = 2**30


@dataclass(slots=True)
class Report:
    """The result of `replay`.

    Attributes:
        max_differences: How many differences are kept; more are only counted.
        num_streams: Streams in the log.
        num_labels: Labels in the log.
        num_unchecked: Labels of streams whose token ids are not in the log.
        num_tokens: Tokens that were run again.
        num_differences: Number of differences.
        num_cut_lines: Incomplete lines, whose writer was stopped.
        tolerance: Largest allowed difference of logits; None when they must be the same bits.
        differences: The first differences.
    """

    max_differences: int
    num_streams: int = 0
    num_labels: int = 0
    num_unchecked: int = 0
    num_tokens: int = 0
    num_differences: int = 0
    num_cut_lines: int = 0
    tolerance: float | None = None
    differences: list[Difference] = field(default_factory=list)

    def add(self, difference: Difference) -> None:
        """Count a difference."""
        self.num_differences += 1
        if len(self.differences) < self.max_differences:
            self.differences.append(difference)


def replay(
    logs: Sequence[str | os.PathLike[str]],
    checkpoint: str | Path,
    *,
    backend: str | None = None,
    revision: str | None = None,
    num_threads: int | None = None,
    tolerance: float | None = None,
    max_differences: int = 100,
    progress: bool = False,
) -> Report:
    """Replay one log, or the pieces of a rotated log.

    Args:
        logs: The files, oldest first.
        checkpoint: The folder or hub id of the checkpoint that wrote the log.
        backend: The backend to run on; by default the log's.
        revision: The revision of the checkpoint on the hub.
        num_threads: See `EngineConfig`.
        tolerance: Largest allowed difference of logits where bits cannot be compared; by default as in TOLERANCES.
        max_differences: How many differences the report keeps.
        progress: Show a progress bar.

    Returns:
        Counts and differences. A line that is not valid is a difference.

    Raises:
        ConfigError: A file is not an audit log.
        CheckpointError: Another checkpoint wrote the log.
    """
    report = Report(max_differences)
    paths = [Path(log) for log in logs]
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; give an audit log")
    replayer = _Replayer(checkpoint, report, backend, revision, num_threads, tolerance)
    size = sum(path.stat().st_size for path in paths)
    with tqdm(total=size, desc="replaying", unit="B", unit_scale=True, disable=not progress) as bar:
        try:
            for line, text in _lines(paths):
                replayer.read(line, text)
                bar.update(len(text))
            replayer.finish()
        finally:
            replayer.close()
    return report


def _lines(paths: Sequence[Path]) -> Iterator[tuple[int, bytes]]:
    """All lines, numbered across files."""
    number = 0
    for path in paths:
        try:
            with path.open("rb") as file:
                while text := file.readline(_MAX_LINE_BYTES):
                    number += 1
                    yield number, text
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error})") from error


class _Replayer:
    """One pass over a log, with an engine for each numeric configuration and a reader for each "start" line."""

    def __init__(
        self,
        checkpoint: str | Path,
        report: Report,
        backend: str | None,
        revision: str | None,
        num_threads: int | None,
        tolerance: float | None,
    ) -> None:
        self._checkpoint, self._report, self._backend = checkpoint, report, backend
        self._revision, self._num_threads, self._tolerance = revision, num_threads, tolerance
        self._engine: Engine | None = None
        self._options: dict[str, Any] = {}
        self._limit: float | None = None  # None: logits must be the same bits
        self._reader: AuditReader | None = None
        self._cut: int | None = None  # a line that is no record; the next line decides what it means
        self._waiting: list[Rerun] = []

    def read(self, line: int, text: bytes) -> None:
        record = parse_line(text)
        is_start = record is not None and record.get("event") == "start"
        if self._cut is not None:
            if is_start:
                self._report.num_cut_lines += 1
            else:
                self._report.add(Difference(self._cut, "", None, "malformed line", "no JSON object", ""))
            self._cut = None
        if record is None:
            self._cut = line
            return
        if is_start:
            self._finish_reader()
            self._start(check_start(record, line), line)
            return
        if self._reader is None:
            raise ConfigError(
                f"line {line}: the log must begin with a start line; give the older pieces of a rotated log first"
            )
        self._add(self._reader.read(record, line))

    def finish(self) -> None:
        """To be called after the last line."""
        if self._cut is not None:
            self._report.num_cut_lines += 1
        if self._reader is None:
            raise ConfigError("the log has no start line: it is empty, or no audit log")
        self._finish_reader()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    # -- internals -----------------------------------------------------------------------------------------

    def _start(self, start: dict[str, Any], line: int) -> None:
        numerics = start["numerics"]
        options = {
            "backend": self._backend or start["backend"],
            "dtype": numerics["dtype"],
            "kv_dtype": numerics["kv_dtype"],
            "quantization": numerics.get("quantization"),
            "block_size": start["block_size"],
        }
        if self._engine is None or options != self._options:
            self.close()
            self._engine, self._options = None, options
            self._engine = Engine.from_pretrained(
                self._checkpoint, revision=self._revision, num_threads=self._num_threads, **options
            )
        engine = self._engine
        if (own := engine.weights_digest()) != start["weights"]:
            raise CheckpointError(
                f"line {line}: they were written with the weights {start['weights'][:80]}, and {self._checkpoint} "
                f"has {own}; give that checkpoint, and split a log of several before their start lines"
            )
        classes = classes_record(engine.core.readout)
        if start.get("classes") != classes:
            self._report.add(
                Difference(line, "", None, "classes", str(start.get("classes"))[:300], str(classes)[:300])
            )
        isa = engine.stats()["isa"]
        is_exact = options["backend"] == start["backend"] == "cpu" and isa == start.get("isa")
        self._limit = None
        if not is_exact:
            self._limit = TOLERANCES[numerics["dtype"]] if self._tolerance is None else self._tolerance
            self._report.tolerance = self._limit
            logger.warning(
                "line %d: the log was written with backend %r and isa %r, this engine has %r and %r: logits are "
                "compared within %g, not bit for bit",
                *(line, start["backend"], start.get("isa"), options["backend"], isa, self._limit),
            )
        self._reader = AuditReader(
            engine.core.readout, engine.core.fingerprint, engine.core.vocab_size, self._report.add
        )

    def _finish_reader(self) -> None:
        if self._reader is None:
            return
        self._add(self._reader.finish())
        self._run()
        report, reader = self._report, self._reader
        report.num_streams += reader.num_streams
        report.num_labels += reader.num_labels
        report.num_unchecked += reader.num_unchecked

    def _add(self, reruns: list[Rerun]) -> None:
        self._waiting += reruns
        num_tokens = sum(len(rerun.token_ids) for rerun in self._waiting) if reruns else 0
        if len(self._waiting) >= _STREAMS_AT_A_TIME or num_tokens >= _TOKENS_AT_A_TIME:
            self._run()

    def _run(self) -> None:
        """Run the waiting streams at once, and compare."""
        reruns, self._waiting = self._waiting, []
        if self._engine is None or not reruns:
            return
        feeds = [
            Feed(rerun.token_ids, [Wanted(check.position, check.role) for check in rerun.checks], None)
            for rerun in reruns
        ]
        core = self._engine.core
        with core.gate:
            states = run_feeds(core, feeds, Policy())
        for rerun, state in zip(reruns, states, strict=True):
            self._report.num_tokens += len(rerun.token_ids)
            said = {
                (label.position, label.role): logits_record(label)
                for label in (*state.prompt_labels, *state.labels)
            }
            for check in rerun.checks:
                now = said[check.position, check.role]
                if now != check.logits and not self._is_close(now, check.logits):
                    self._report.add(
                        Difference(
                            *(check.line, rerun.stream, check.position, "logits"),
                            *_where_they_differ(check.logits, now, core.readout.columns[check.role]),
                        )
                    )

    def _is_close(self, now: str, logged: str) -> bool:
        if self._limit is None:
            return False
        return np.allclose(read_logits(now), read_logits(logged), rtol=0, atol=self._limit, equal_nan=True)


def _where_they_differ(logged: str, now: str, columns: Any) -> tuple[str, str]:
    """Both values of the class whose logits are farthest apart."""
    old, new = read_logits(logged), read_logits(now)
    with np.errstate(invalid="ignore"):
        apart = np.abs(old.astype(np.float64) - new)
    apart[(old.view(np.int32) != new.view(np.int32)) & ~np.isfinite(apart)] = np.inf
    index = int(np.where(old.view(np.int32) != new.view(np.int32), apart, -1).argmax())
    name = (*columns.risks, *columns.categories)[index]
    return f"{name} {old[index]!s}", f"{name} {new[index]!s}"
