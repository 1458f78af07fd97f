"""AuditReader: goes through an audit log line by line, keeps every stream's books as the engine did, and reports
where the log contradicts itself.

Verdicts are checked here: they follow from the labels on record. What the labels say is for the model to confirm:
the reader hands out Reruns, ids with the logits that must come of them. Any line may be wrong in any way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from guardengine.checkpoint.fingerprint import Fingerprint
from guardengine.core.readout import Readout
from guardengine.core.state import StreamState, Wanted
from guardengine.core.token_ids import check_token_ids
from guardengine.errors import ConfigError, GuardEngineError
from guardengine.labels import Role
from guardengine.records.audit_log import FORMAT, VERSION
from guardengine.records.codec import (
    ROLES,
    LoggedLabel,
    check_logits,
    logits_record,
    make_labels,
    read_count,
    read_list,
    read_policy,
    read_row,
    read_text,
    read_verdict,
    read_wanted,
    verdict_record,
)
from guardengine.records.snapshot import read_snapshot

_MAX_TOKENS = 2**24


class Difference(NamedTuple):
    """Something on record that is not so. position: a token's, or None."""

    line: int
    stream: str
    position: int | None
    what: str
    logged: str
    replayed: str


class Check(NamedTuple):
    """Logits on record, to be found again."""

    line: int
    position: int
    role: Role
    logits: str


class Rerun(NamedTuple):
    """Ids to run the model over, and what it said about them."""

    stream: str
    token_ids: list[int]
    checks: list[Check]


class _Followed:
    """A stream as the log tells it."""

    def __init__(self, state: StreamState, line: int, *, has_ids: bool) -> None:
        self.state, self.line, self.has_ids = state, line, has_ids
        self.decision = verdict_record(state.policy.verdict(state.policy.start()))  # the newest on record
        self.checks: list[Check] = []

    def rerun(self) -> list[Rerun]:
        """What is to be checked so far, which then counts as checked."""
        checks, self.checks = self.checks, []
        if not checks or not self.has_ids:
            return []
        ids = self.state.token_ids[: checks[-1].position + 1].tolist()
        return [Rerun(self.state.stream_id, ids, checks)]


class AuditReader:
    """What one engine wrote, from its "start" line on. `readout`, `vocab_size`: of the checkpoint it ran."""

    def __init__(
        self,
        readout: Readout,
        fingerprint: Fingerprint,
        vocab_size: int,
        report: Callable[[Difference], None],
    ) -> None:
        self.num_streams = self.num_labels = 0
        self.num_unchecked = 0  # labels whose ids are not in the log
        self._has_ended = False
        self._readout, self._fingerprint, self._vocab_size = readout, fingerprint, vocab_size
        self._report = report
        self._streams: dict[str, _Followed] = {}
        self._next_number = 1
        self._line = 0

    def read(self, record: dict[str, Any], line: int) -> list[Rerun]:
        """Follow one line; returns what may be checked now."""
        self._line = line
        stream = record.get("stream", "")
        name = stream if isinstance(stream, str) else ""
        try:
            number = read_count(record.get("n"), "n", 2**60)
            if number != self._next_number:
                self._differs(
                    name, None, "line number", str(number), f"{self._next_number}: lines are missing"
                )
            self._next_number = number + 1
            event = read_text(record.get("event"), "event")
            if event not in _EVENTS:
                raise ConfigError(f"event={event[:80]!r}: no such event")
            if self._has_ended:
                raise ConfigError(f"event={event!r}: the engine was closed before it")
            if event == "end":
                self._has_ended = True
                return []
            if not name:
                raise ConfigError("stream: a name is needed")
            if event not in ("open", "restore", "fork") and name not in self._streams:
                raise ConfigError("stream: it was never opened")
            reruns: list[Rerun] = getattr(self, f"_{event}")(name, record)
            return reruns
        except (GuardEngineError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            what = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
            self._differs(name, None, "malformed line", what[:300], "")
            return []

    def finish(self) -> list[Rerun]:
        """The log ends here, or another engine begins to write; returns what is left to check."""
        reruns = [rerun for followed in self._streams.values() for rerun in followed.rerun()]
        self._streams.clear()
        return reruns

    # -- events --------------------------------------------------------------------------------------------

    def _open(self, name: str, record: dict[str, Any]) -> list[Rerun]:
        policy = read_policy(record["policy"], "policy")
        return self._begin(StreamState(name, policy, [(-1, policy.start())]), has_ids=True)

    def _begin(self, state: StreamState, *, has_ids: bool) -> list[Rerun]:
        self.num_streams += 1
        left: list[Rerun] = []
        if state.stream_id in self._streams:
            self._differs(state.stream_id, None, "stream", "opened", "was open already")
            left = self._streams[state.stream_id].rerun()
        self._streams[state.stream_id] = _Followed(state, self._line, has_ids=has_ids)
        return left

    def _tokens(self, name: str, record: dict[str, Any]) -> list[Rerun]:
        followed = self._streams[name]
        state = followed.state
        start = read_count(record["position"], "position", _MAX_TOKENS)
        if start != state.num_tokens:
            self._differs(name, start, "tokens", f"from {start} on", f"{state.num_tokens} tokens by then")
            return []
        ids, has_ids = self._ids(record)
        followed.has_ids &= has_ids
        end = start + len(ids)
        wanted = read_wanted(record["wanted"], "wanted", start, end)
        state.token_ids.extend(ids)
        state.wanted.extend(wanted)
        return []

    def _labels(self, name: str, record: dict[str, Any]) -> list[Rerun]:
        followed = self._streams[name]
        state = followed.state
        for index, row in enumerate(record["labels"]):
            position, role, risk, category, logits = read_row(row, f"labels[{index}]", 5)
            read_count(position, f"labels[{index}][0]", state.num_tokens - 1)
            read_text(role, f"labels[{index}][1]", ROLES)
            check_logits(logits, f"labels[{index}][4]", role, self._readout)
            if Wanted(position, role) not in state.wanted_in(position, position + 1):
                self._differs(name, position, "label", "given", "none was owed")
                continue
            self._miss_labels(followed, position)
            said = LoggedLabel(position, role, logits, name)
            label = make_labels([said], state.token_ids, self._readout)[0]
            if [label.risk, label.category] != [risk, category]:
                self._differs(
                    name, position, "classes", f"{risk}, {category}"[:200], f"{label.risk}, {label.category}"
                )
            del state.wanted[0]
            state.record(label)
            self._check_later(followed, position, role, logits)
        state.num_seen_tokens = read_count(record["computed"], "computed", state.num_tokens)
        self._miss_labels(followed, state.num_seen_tokens)
        self._check_outcome(followed, record)
        return []

    def _failure(self, name: str, record: dict[str, Any]) -> list[Rerun]:
        followed = self._streams[name]
        followed.state.fail(read_text(record["failure"], "failure", ("error", "timeout", "overload")))
        num_tokens = followed.state.failures[-1].num_tokens
        if record["num_tokens"] != num_tokens:
            self._differs(name, None, "tokens by then", repr(record["num_tokens"])[:80], str(num_tokens))
        self._check_outcome(followed, record)
        return []

    def _rollback(self, name: str, record: dict[str, Any]) -> list[Rerun]:
        followed = self._streams[name]
        num_tokens = read_count(record["tokens"], "tokens", followed.state.num_tokens)
        is_cut = bool(followed.checks) and followed.checks[-1].position >= num_tokens
        reruns = followed.rerun() if is_cut else []
        followed.state.truncate(num_tokens, 1)
        self._check_outcome(followed, record)
        return reruns

    def _fork(self, name: str, record: dict[str, Any]) -> list[Rerun]:
        parent = self._streams.get(read_text(record["parent"], "parent"))
        if parent is None:
            raise ConfigError("parent: it was never opened")
        left = self._begin(parent.state.copy(name), has_ids=parent.has_ids)
        self._streams[name].decision = parent.decision
        return left

    def _restore(self, name: str, record: dict[str, Any]) -> list[Rerun]:
        raw = dict(record["snapshot"])
        has_ids = True
        if isinstance(raw["token_ids"], dict):
            raw["token_ids"], has_ids = self._ids(raw["token_ids"])
        raw["turns"] = None  # they matter for further turns, whose ids are on record
        state = read_snapshot(
            raw,
            readout=self._readout,
            fingerprint=self._fingerprint,
            vocab_size=self._vocab_size,
            chat=None,
            stream_id=name,
        ).state
        left = self._begin(state, has_ids=has_ids)
        followed = self._streams[name]
        followed.decision = verdict_record(state.verdict)
        for label in sorted((*state.prompt_labels, *state.labels), key=lambda label: label.position):
            self._check_later(followed, label.position, label.role, logits_record(label))
        return left

    def _close(self, name: str, record: dict[str, Any]) -> list[Rerun]:
        followed = self._streams[name]
        state = followed.state
        state.num_seen_tokens = read_count(record["computed"], "computed", state.num_tokens)
        self._miss_labels(followed, state.num_seen_tokens)
        for what, is_now in (
            ("tokens", state.num_tokens),
            ("labels", len(state.prompt_labels) + len(state.labels)),
        ):
            if record[what] != is_now:
                self._differs(name, None, f"{what} at close", repr(record[what])[:80], str(is_now))
        self._check_outcome(followed, record)
        del self._streams[name]
        return followed.rerun()

    # -- internals -----------------------------------------------------------------------------------------

    def _differs(self, stream: str, position: int | None, what: str, logged: str, replayed: str) -> None:
        self._report(Difference(self._line, stream, position, what, logged, replayed))

    def _ids(self, record: dict[str, Any]) -> tuple[list[int], bool]:
        """The ids, or as many zeros where only their digest is on record."""
        if "ids" in record:
            return check_token_ids(read_list(record["ids"], "ids", lambda x, _: x), self._vocab_size), True
        return [0] * read_count(record["num_ids"], "num_ids", _MAX_TOKENS), False

    def _check_later(self, followed: _Followed, position: int, role: Role, logits: str) -> None:
        self.num_labels += 1
        self.num_unchecked += not followed.has_ids
        followed.checks.append(Check(self._line, position, role, logits))

    def _miss_labels(self, followed: _Followed, end: int) -> None:
        """Labels owed before position `end` should be on record by now."""
        for wanted in followed.state.wanted_in(0, end):
            self._differs(
                followed.state.stream_id, wanted.position, "label", "none", f"one of role {wanted.role}"
            )
            del followed.state.wanted[0]

    def _check_outcome(self, followed: _Followed, record: dict[str, Any]) -> None:
        state, verdict = followed.state, followed.state.verdict
        newest = state.policy_states[-1][0]
        at = None if newest < 0 else newest
        decision = verdict_record(verdict)
        is_changed = decision != followed.decision
        if "verdict" in record or is_changed:
            logged = read_verdict(record["verdict"], "verdict") if "verdict" in record else followed.decision
            if logged != decision:
                self._differs(state.stream_id, at, "verdict", _in_words(logged), _in_words(decision))
        if record["cleared"] != verdict.cleared:
            self._differs(state.stream_id, at, "cleared", repr(record["cleared"])[:80], str(verdict.cleared))
        followed.decision = decision


_EVENTS = ("open", "restore", "tokens", "labels", "failure", "rollback", "fork", "close", "end")


def parse_line(text: bytes) -> dict[str, Any] | None:
    """A line's record, or None when it is no JSON object."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def check_start(record: dict[str, Any], line: int) -> dict[str, Any]:
    """A "start" line. Raises ConfigError for what this version cannot read."""
    try:
        read_text(record["format"], "format", (FORMAT,))
        if (version := read_count(record["version"], "version", 2**31)) != VERSION:
            raise ConfigError(
                f"version={version}: version {VERSION} is read; use the guardengine that wrote it"
            )
        read_text(record["weights"], "weights")
        read_text(record["backend"], "backend")
        numerics = record["numerics"]
        for name in ("dtype", "kv_dtype"):
            read_text(numerics[name], name)
        if numerics["quantization"] is not None:
            read_text(numerics["quantization"], "quantization")
        read_count(record["block_size"], "block_size", 2**20, 1)
    except ConfigError as error:
        raise ConfigError(f"line {line}: {error}") from None
    except (KeyError, TypeError) as error:
        raise ConfigError(f"line {line}: a damaged start line ({error})") from None
    return record


def _in_words(decision: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in decision.items() if value is not None)[:300]
