"""Recorder: what an engine's core tells whoever keeps a record of it, such as the audit log.

One method an event. The core calls it when the event has happened, and before the call or the step that made it happen
returns. Recording an event never fails: it only buffers. `check_writable` and `flush` raise AuditError, so the core
calls them where a call can still be refused, or a step's labels kept back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from guardengine.core.state import StreamState, Wanted
from guardengine.labels import Label
from guardengine.policy import Failure


class Recorder:
    """The recorder of an engine that keeps no record: every event passes without a trace."""

    is_failing = False  # the newest `flush` failed, so labels wait until one succeeds

    # -- whether it can be written -------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Called before anything changes. Raises AuditError while what was recorded cannot be written."""

    def flush(self) -> None:
        """Write what was recorded. Raises AuditError, and may be tried again: nothing is lost."""

    def close(self) -> None:
        """The engine was closed: write what is left. Raises AuditError, and may then be called again."""

    # -- events --------------------------------------------------------------------------------------------

    def opened(self, state: StreamState, wanted: Sequence[Wanted]) -> None:
        """A stream was opened with its first tokens, and those labels of them are wanted."""

    def restored(self, state: StreamState, num_undelivered: int) -> None:
        """A stream came from another engine; its newest `num_undelivered` labels were not returned by `step` yet."""

    def forked(self, branch: StreamState, parent: StreamState) -> None:
        """A stream was branched off another."""

    def appended(self, state: StreamState, start: int, wanted: Sequence[Wanted]) -> None:
        """More tokens of a stream were accepted, from position `start` on, and those labels of them are wanted."""

    def computed(self, labels: Sequence[Label], states: Mapping[str, StreamState]) -> None:
        """A step came to these labels. `states` has the books of all open streams, by stream_id."""

    def failed(self, state: StreamState, failure: Failure) -> None:
        """Tokens of an open stream went unjudged."""

    def rolled_back(self, state: StreamState) -> None:
        """A stream has lost its last tokens; `state.num_tokens` stayed."""

    def closed(self, state: StreamState) -> None:
        """A stream was closed."""
