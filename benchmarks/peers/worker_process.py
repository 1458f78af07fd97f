"""The orchestrator's half of the protocol: a worker process, asked one thing at a time and never waited for without
an end. Knows nothing of what workers compute."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

_LEAVE_S = 2.0  # for a worker to leave by itself at the end of its stdin
_READ_BYTES = 2**20
_TICKS = os.sysconf("SC_CLK_TCK")
_SIGNALS = {
    signal.SIGILL: "it uses instructions that this machine lacks",
    signal.SIGKILL: "killed, most likely for want of memory",
    signal.SIGSEGV: "it crashed",
}


class WorkerFailed(Exception):
    """A worker that cannot go on, or a request it refused; the message is the reason for the record."""


class WorkerProcess:
    """One worker. Use it in a `with` block: however that is left, the process and its children are gone after."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], timeout_s: float
    ) -> None:
        self.name, self.timeout_s = name, timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the worker)
        self._unread = b""
        try:
            # A session of its own: Ctrl-C in the terminal is for the orchestrator, which then ends the whole group.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise WorkerFailed(f"{name} cannot be started: {error}") from error
        assert self._process.stdin is not None, "asked for above"
        assert self._process.stdout is not None, "asked for above"
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)

    def request(self, command: str, **fields: Any) -> Any:
        """Send one line and wait for the answer.

        Raises WorkerFailed when the worker refuses, dies, answers with something else, or takes longer than
        `timeout_s`; but for a refusal the worker is ended then.
        """
        line = json.dumps({"command": command, **fields}).encode() + b"\n"
        try:
            answer = self._exchange(line, time.monotonic() + self.timeout_s)
        except WorkerFailed as error:
            self.close(at_once=True)
            raise WorkerFailed(f"{self.name} `{command}`: {error}") from None
        try:
            message = json.loads(answer)
            if "error" not in message:
                return message["result"]
        except (ValueError, TypeError, KeyError):
            self.close(at_once=True)
            shown = answer[:100].decode(errors="replace")
            raise WorkerFailed(f"{self.name} `{command}`: {shown!r} came instead of an answer") from None
        raise WorkerFailed(f"{self.name} `{command}`: {message['error']}")

    @property
    def is_alive(self) -> bool:
        return not self._log.closed and self._process.poll() is None

    def cpu_seconds(self) -> float:
        """Processor time that the process has used since its start; 0 where the system does not tell."""
        try:
            with open(f"/proc/{self._process.pid}/stat", encoding="utf-8") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def close(self, *, at_once: bool = False) -> None:
        """End the worker; safe to call twice. It may leave by itself unless `at_once`."""
        if self._log.closed:
            return
        with contextlib.suppress(OSError):
            self._stdin.close()
        try:
            if not at_once:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_LEAVE_S)
        finally:
            # Also when it left: the group may hold children of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._stdout.close()
            self._log.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(at_once=error is not None)

    def _exchange(self, line: bytes, deadline: float) -> bytes:
        if self._log.closed:
            raise WorkerFailed("the worker has ended")
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WorkerFailed(
                    f"no answer within {self.timeout_s:g} s; raise --timeout if it only needs longer"
                )
            # Written and read in turns: a worker that reads nothing must not block the writer for ever.
            readable, writable, _ = select.select([self._stdout], [self._stdin] if line else [], [], left)
            if writable:
                try:
                    line = line[os.write(self._stdin.fileno(), line) :]
                except BlockingIOError:
                    pass
                except OSError:
                    raise WorkerFailed(self._how_it_ended()) from None
            if readable:
                read = os.read(self._stdout.fileno(), _READ_BYTES)
                if not read:
                    raise WorkerFailed(self._how_it_ended())
                self._unread += read
        answer, _, self._unread = self._unread.partition(b"\n")
        return answer

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            return "it closed its output" + self._last_words()
        if status < 0:
            name = signal.Signals(-status).name
            return (
                f"ended by {name} ({_SIGNALS.get(signal.Signals(-status), 'from outside')})"
                + self._last_words()
            )
        return f"ended with status {status}" + self._last_words()

    def _last_words(self) -> str:
        """The last line of its stderr, which is where Python says what was wrong."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4096))
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f": {lines[-1].strip()[:300]}" if lines else ""
