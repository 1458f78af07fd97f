"""Audit log: what an engine was given, what it said and what was decided, one JSON object a line.

    start    format, version, weights' digest, backend, isa, numerics, class names: an engine begins to write
    open     stream, tenant, priority, policy
    restore  stream, snapshot: a stream came from another engine
    tokens   stream, position of the first, ids (or their digest), wanted: runs [role, first, end) of labels to come
    labels   stream, computed: tokens seen by now, labels: [position, role, risk, category, logits]
    failure  stream, failure, num_tokens: tokens went unjudged
    rollback stream, tokens: how many stayed
    fork     stream, parent
    close    stream, tokens, computed, labels: how many there were; the verdict
    end      the engine was closed

Every line has `n`, which counts from 0 at "start", and `time`, in seconds since 1970. After labels, failures and
rollbacks `cleared` is how many tokens may be shown, and `verdict` is there when the decision has changed. Logits are
hex digits of little-endian float32, risk classes first; `guardengine replay` computes them again.

What `step` returns is in the file by then, in the operating system's hands (not forced to disk). When the file cannot
be written, steps raise AuditError, nothing more is computed or accepted, and the labels come with the first step after
it can be written again: no label goes missing, and none is handed out that is not on record. Lines are appended, never
sought: rotate the file by copying and truncating it (logrotate's copytruncate), since the file stays open.

Digests of ids cover the stream from its start, so that an id cannot be found by trying all of them, unless all before
it can be guessed. Whoever must not see texts should not see logits either: they say what a text is about.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guardengine._version import __version__
from guardengine.checkpoint.fingerprint import Fingerprint
from guardengine.core.readout import Readout
from guardengine.core.recorder import Recorder
from guardengine.core.state import StreamState, Wanted
from guardengine.errors import AuditError, ConfigError
from guardengine.labels import Label
from guardengine.policy import Failure
from guardengine.records.codec import logits_record, policy_record, verdict_record, wanted_record
from guardengine.records.snapshot import take_snapshot
from guardengine.runners.runner import Runner

FORMAT, VERSION = "guardengine-audit", 1


class AuditLog:
    """A file of lines, appended to. `write` only buffers; `flush` raises AuditError and may be tried again."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open or make the file. Raises ConfigError, also when another engine has it open."""
        self.path = Path(path)
        self.has_failed = False
        self._buffer = bytearray()
        self._number = 0
        mend = "give another path"
        try:
            if self.path.exists() and not self.path.is_file():
                raise ConfigError(f"audit_log={str(self.path)!r} is not a regular file; {mend}")
            self._file = open(self.path, "a+b", buffering=0, opener=_open_private)  # noqa: SIM115
        except (OSError, ValueError) as error:
            raise ConfigError(f"audit_log={str(self.path)!r} cannot be opened ({error}); {mend}") from error
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            mend = "give each engine a file of its own"
            raise ConfigError(f"audit_log={str(self.path)!r} is in use ({error}); {mend}") from error
        size = self._file.seek(0, os.SEEK_END)
        if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
            self._buffer += b"\n"  # after a line that its writer did not live to finish

    def write(self, event: str, **values: Any) -> None:
        """Add a line to what the next `flush` writes."""
        record = {"n": self._number, "time": round(time.time(), 3), "event": event, **values}
        self._buffer += json.dumps(record, separators=(",", ":")).encode() + b"\n"
        self._number += 1

    def flush(self) -> None:
        """Write what is buffered. Raises AuditError; what was not written stays buffered."""
        try:
            while self._buffer:
                del self._buffer[: self._file.write(self._buffer)]
        except OSError as error:
            self.has_failed = True
            raise AuditError(
                f"{self.path} cannot be written ({error}): labels are held back until it can be; make room, or mend it"
            ) from error
        self.has_failed = False

    def close(self) -> None:
        """Write what is left and let go of the file. Raises AuditError, and may then be called again."""
        self.flush()
        self._file.close()


class AuditRecorder(Recorder):
    """Keeps the audit log of an engine: see EngineCore's `recorder`."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        keeps_token_ids: bool,
        fingerprint: Fingerprint,
        runner: Runner,
        readout: Readout,
        block_size: int,
    ) -> None:
        """Open the file, and write what the engine is.

        Args:
            path: the file, made when it is not there.
            keeps_token_ids: whether ids are written, or only how many there are and the digest of all so far.
            fingerprint, runner, readout, block_size: the engine's.

        Raises:
            ConfigError: the file cannot be opened, or another engine has it open.
            CheckpointError: the checkpoint's files cannot be read for their digest.
            AuditError: the file cannot be written.
        """
        weights = fingerprint.weights()
        self.log = AuditLog(path)
        self._fingerprint, self._keeps_token_ids = fingerprint, keeps_token_ids
        self._digests: dict[str, Any] = {}  # by stream: of the ids so far, where the log has digests
        self._verdicts: dict[str, dict[str, Any]] = {}  # by stream: the newest on record
        self._has_ended = False
        self.log.write(
            "start",
            format=FORMAT,
            version=VERSION,
            guardengine=__version__,
            weights=weights,
            backend=runner.info.backend,
            isa=runner.info.isa,
            numerics=fingerprint.numerics._asdict(),
            block_size=block_size,
            token_ids=keeps_token_ids,
            classes=classes_record(readout),
        )
        self.log.flush()

    @property
    def is_failing(self) -> bool:  # type: ignore[override]
        return self.log.has_failed

    def check_writable(self) -> None:
        # While the log cannot be written, nothing is accepted: what is buffered would grow without end.
        if self.log.has_failed:
            self.log.flush()

    def flush(self) -> None:
        self.log.flush()

    def close(self) -> None:
        if not self._has_ended:
            self.log.write("end")
            self._has_ended = True
        self.log.close()

    # -- events --------------------------------------------------------------------------------------------

    def opened(self, state: StreamState, wanted: Sequence[Wanted]) -> None:
        self._verdicts[state.stream_id] = verdict_record(state.policy.verdict(state.policy.start()))
        policy = policy_record(state.policy)
        self._write("open", state, tenant=state.tenant, priority=state.priority, policy=policy)
        self.appended(state, 0, wanted)

    def restored(self, state: StreamState, num_undelivered: int) -> None:
        snapshot = take_snapshot(state, self._fingerprint, num_undelivered)
        if not self._keeps_token_ids:
            snapshot["token_ids"] = self._ids(state, 0)
        self._verdicts[state.stream_id] = verdict_record(state.verdict)
        self._write("restore", state, snapshot=snapshot)

    def forked(self, branch: StreamState, parent: StreamState) -> None:
        self._verdicts[branch.stream_id] = self._verdicts[parent.stream_id]
        self._write("fork", branch, parent=parent.stream_id)

    def appended(self, state: StreamState, start: int, wanted: Sequence[Wanted]) -> None:
        ids = self._ids(state, start)
        self._write("tokens", state, position=start, **ids, wanted=wanted_record(wanted))

    def computed(self, labels: Sequence[Label], states: Mapping[str, StreamState]) -> None:
        by_stream: dict[str, list[Label]] = {}
        for label in labels:
            by_stream.setdefault(label.stream_id, []).append(label)
        for stream_id, own in by_stream.items():
            state = states[stream_id]
            self._write(
                "labels",
                state,
                computed=state.num_seen_tokens,
                labels=[
                    (label.position, label.role, label.risk, label.category, logits_record(label))
                    for label in own
                ],
                **self._outcome(state),
            )

    def failed(self, state: StreamState, failure: Failure) -> None:
        num_tokens = state.failures[-1].num_tokens
        self._write("failure", state, failure=failure, num_tokens=num_tokens, **self._outcome(state))

    def rolled_back(self, state: StreamState) -> None:
        self._digests.pop(state.stream_id, None)
        self._write("rollback", state, tokens=state.num_tokens, **self._outcome(state))

    def closed(self, state: StreamState) -> None:
        self._write(
            "close",
            state,
            tokens=state.num_tokens,
            computed=state.num_seen_tokens,
            labels=len(state.prompt_labels) + len(state.labels),
            cleared=state.verdict.cleared,
            verdict=verdict_record(state.verdict),
        )
        self._digests.pop(state.stream_id, None)
        self._verdicts.pop(state.stream_id, None)

    # -- internals -----------------------------------------------------------------------------------------

    def _write(self, event: str, state: StreamState, **values: Any) -> None:
        self.log.write(event, stream=state.stream_id, **values)

    def _outcome(self, state: StreamState) -> dict[str, Any]:
        """What may be shown, and the verdict when it is not the one on record."""
        verdict = state.verdict
        decision = verdict_record(verdict)
        if decision == self._verdicts[state.stream_id]:
            return {"cleared": verdict.cleared}
        self._verdicts[state.stream_id] = decision
        return {"cleared": verdict.cleared, "verdict": decision}

    def _ids(self, state: StreamState, start: int) -> dict[str, Any]:
        """The ids from position `start` on, or how many there are and the digest of all so far."""
        if self._keeps_token_ids:
            return {"ids": state.token_ids[start:].tolist()}
        digest = self._digests.get(state.stream_id)
        is_new = digest is None
        digest = self._digests[state.stream_id] = hashlib.sha256() if digest is None else digest
        digest.update(state.token_ids[0 if is_new else start :].tobytes())  # 4 bytes each, little-endian
        return {"num_ids": state.num_tokens - start, "sha256": digest.hexdigest()}


def classes_record(readout: Readout) -> dict[str, Any]:
    """What the logits of each role stand for, in order."""
    return {
        role: {"risks": list(columns.risks), "categories": list(columns.categories)}
        for role, columns in readout.columns.items()
    }


def _open_private(path: str, flags: int) -> int:
    """Conversations are nobody else's business: a new file is its owner's only."""
    return os.open(path, flags, 0o600)
