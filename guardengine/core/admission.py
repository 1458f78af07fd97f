"""Admission: how many streams may be open and how many tokens may wait, in all and for each tenant."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from guardengine import checks
from guardengine.config import EngineConfig
from guardengine.core.scheduler import MAX_PRIORITY
from guardengine.core.state import StreamState
from guardengine.errors import ConfigError, IntegrityError, Overloaded, StreamTooLong
from guardengine.policy import Policy


class Ticket(NamedTuple):
    """Whose a stream is and how it is treated."""

    policy: Policy
    stream_id: str | None = None
    tenant: str = ""
    cache_salt: str | None = None  # None: the tenant's name
    priority: int = 0

    def check(self) -> None:
        """Raise ConfigError for what cannot be."""
        stream_id, priority = self.stream_id, self.priority
        if stream_id is not None and (not isinstance(stream_id, str) or not stream_id):
            raise ConfigError(f"stream_id={stream_id!r}: a non-empty string is needed")
        for name, value in (
            ("tenant", self.tenant),
            ("cache_salt", "" if self.cache_salt is None else self.cache_salt),
        ):
            if not isinstance(value, str):
                raise ConfigError(f"{name}={value!r}: a string is needed")
        checks.whole_number("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)


def check_timeout(timeout_s: float) -> float:
    """Raise ConfigError unless it is a number of seconds above 0."""
    is_number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    if not is_number or not 0 < timeout_s < 1e9:
        raise ConfigError(f"timeout_s={timeout_s!r}: a number of seconds above 0 is needed, or None")
    return timeout_s


@dataclass(slots=True)
class Usage:
    """What a tenant, or everybody, has of the engine."""

    num_streams: int = 0
    num_pending_tokens: int = 0


class Admission:
    """Counts open streams and pending tokens, and refuses what would pass a limit."""

    def __init__(self, limits: EngineConfig) -> None:
        self._limits = limits
        self._limits_pending = (
            limits.max_pending_tokens is not None or limits.max_pending_tokens_per_tenant is not None
        )
        self.total = Usage()
        self._names = itertools.count()
        self._tenants: dict[str, Usage] = {}
        self._pending: dict[str, int] = {}  # what is counted of each open stream

    def admit(self, ticket: Ticket) -> str:
        """The name of a stream that may be opened now: the ticket's, or a new one.

        Raises:
            ConfigError: the ticket has a value out of its range, or a name that is in use.
            Overloaded: there is no place for one more stream, or for one more of the tenant's.
        """
        ticket.check()
        stream_id = ticket.stream_id
        if stream_id is None:
            stream_id = next(name for i in self._names if (name := f"stream-{i}") not in self._pending)
        if stream_id in self._pending:
            raise ConfigError(f"stream_id={stream_id!r} is in use; choose another or close that stream")
        self.check_place(ticket.tenant)
        return stream_id

    def check_place(self, tenant: str) -> None:
        """Raise Overloaded unless one more stream may be opened."""
        if self.total.num_streams >= self._limits.max_num_streams:
            raise Overloaded(
                f"{self.total.num_streams} streams are open, max_num_streams={self._limits.max_num_streams}; close "
                "some first"
            )
        most = self._limits.max_streams_per_tenant
        if most is not None and self._usage(tenant).num_streams >= most:
            raise Overloaded(
                f"tenant {tenant!r} has {most} streams open, max_streams_per_tenant={most}; close some first"
            )

    def check_pending(self, tenant: str, num_tokens: int) -> None:
        """Raise Overloaded unless `num_tokens` more tokens may wait, or StreamTooLong where they never may."""
        if not self._limits_pending:
            return
        for usage, option, whose in (
            (self.total, "max_pending_tokens", "in all"),
            (self._usage(tenant), "max_pending_tokens_per_tenant", f"of tenant {tenant!r}"),
        ):
            most = getattr(self._limits, option)
            if most is not None and num_tokens > most:
                raise StreamTooLong(
                    f"{num_tokens} tokens at once exceed {option}={most}; append fewer at a time or raise it"
                )
            if most is not None and usage.num_pending_tokens + num_tokens > most:
                raise Overloaded(
                    f"{usage.num_pending_tokens} tokens are pending {whose} and {num_tokens} more would pass "
                    f"{option}={most}; retry when some are done"
                )

    def enter(self, state: StreamState) -> None:
        """Count a stream that was opened."""
        for usage in (self.total, self._tenants.setdefault(state.tenant, Usage())):
            usage.num_streams += 1
        self._pending[state.stream_id] = 0
        self.update(state)

    def update(self, state: StreamState) -> None:
        """Count what is pending of a stream by now."""
        num_pending = state.num_pending_tokens
        if more := num_pending - self._pending[state.stream_id]:
            self.total.num_pending_tokens += more
            self._tenants[state.tenant].num_pending_tokens += more
            self._pending[state.stream_id] = num_pending

    def leave(self, state: StreamState) -> None:
        """A stream was closed."""
        num_pending = self._pending.pop(state.stream_id)
        for usage in (self.total, self._tenants[state.tenant]):
            usage.num_streams -= 1
            usage.num_pending_tokens -= num_pending
        if not self._tenants[state.tenant].num_streams:
            del self._tenants[state.tenant]

    def _usage(self, tenant: str) -> Usage:
        return self._tenants.get(tenant, Usage())

    def check_integrity(self, states: Iterable[StreamState]) -> None:
        """Raise IntegrityError unless the counts are those of the open streams."""
        pending = {state.stream_id: state.num_pending_tokens for state in states}
        if pending != self._pending or self.total != Usage(len(pending), sum(pending.values())):
            raise IntegrityError(
                f"pending tokens on the books: {self._pending}, {self.total}; in fact: {pending}"
            )
        of_tenants = [
            sum(getattr(usage, part) for usage in self._tenants.values()) for part in Usage.__slots__
        ]
        if Usage(*of_tenants) != self.total:
            raise IntegrityError(f"the tenants' counts {self._tenants} do not add up to {self.total}")
