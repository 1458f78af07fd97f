"""Snapshots: a stream's books as a small JSON value, so that it goes on in another process.

What a snapshot holds is what cannot be computed again without the model: ids, turns, labels so far (their logits,
exactly) and which are owed, policy and failures. Keys and values are computed again by the next `append`; names,
probabilities and the policy's states follow from the logits. Deadlines end with the process that set them.

A snapshot is checked for its form, in full and before anything changes. It is not checked for its truth: who can
alter it can alter verdicts, so keep it where only those can write who may.
"""

from __future__ import annotations

import json
from array import array
from typing import Any, NamedTuple

from guardengine._version import __version__
from guardengine.checkpoint.fingerprint import Fingerprint
from guardengine.core.readout import Readout
from guardengine.core.state import Failed, StreamState, Turn
from guardengine.core.token_ids import check_token_ids
from guardengine.errors import CheckpointError, ConfigError, InvalidTokens
from guardengine.labels import Label
from guardengine.records.codec import (
    ROLES,
    LoggedLabel,
    check_logits,
    fail,
    logits_record,
    make_labels,
    policy_record,
    read_count,
    read_list,
    read_object,
    read_policy,
    read_row,
    read_text,
    read_wanted,
    wanted_record,
)
from guardengine.text.chat_template import ChatTemplate

FORMAT, VERSION = "guardengine-snapshot", 1
_MAX_PRIORITY = 2**31  # which priorities there are is the scheduler's business
_KEYS = (
    *("format", "version", "guardengine", "weights", "numerics"),
    *("stream_id", "tenant", "salt", "priority", "policy"),
    *("token_ids", "turns", "num_seen_tokens", "wanted", "labels", "num_undelivered", "failures"),
)


class Restored(NamedTuple):
    """What a snapshot holds. undelivered: those of the labels that no `step` has returned."""

    state: StreamState
    undelivered: list[Label]


def take_snapshot(state: StreamState, fingerprint: Fingerprint, num_undelivered: int) -> dict[str, Any]:
    """A stream's books, of which the newest `num_undelivered` labels were not returned by `step` yet.

    Raises CheckpointError when the checkpoint's files cannot be read for their digest (see Fingerprint).
    """
    labels = sorted((*state.prompt_labels, *state.labels), key=lambda label: label.position)
    return {
        "format": FORMAT,
        "version": VERSION,
        "guardengine": __version__,
        "weights": fingerprint.weights(),
        "numerics": fingerprint.numerics._asdict(),
        "stream_id": state.stream_id,
        "tenant": state.tenant,
        "salt": state.salt.hex(),
        "priority": state.priority,
        "policy": policy_record(state.policy),
        "token_ids": state.token_ids.tolist(),
        "turns": None if state.turns is None else [list(turn) for turn in state.turns],
        "num_seen_tokens": state.num_seen_tokens,
        "wanted": wanted_record(state.wanted),
        "labels": [
            [
                *(label.position, label.role, logits_record(label)),
                *([] if label.stream_id == state.stream_id else [label.stream_id]),
            ]
            for label in labels
        ],
        "num_undelivered": num_undelivered,
        "failures": [list(failed) for failed in state.failures],
    }


def read_snapshot(
    snapshot: Any,
    *,
    readout: Readout,
    fingerprint: Fingerprint,
    vocab_size: int,
    chat: ChatTemplate | None,
    stream_id: str | None = None,
) -> Restored:
    """The books again, with nothing in the cache. `stream_id`: instead of the snapshot's.

    Raises ConfigError, naming the key, the value and the mend, for what `take_snapshot` did not write, and
    CheckpointError for a snapshot of other weights.
    """
    raw = _plain(snapshot)
    _check_origin(raw, fingerprint)
    name = read_text(raw["stream_id"], "snapshot['stream_id']")
    own_id = name if stream_id is None else stream_id
    token_ids = _token_ids(raw["token_ids"], vocab_size)
    num_tokens = len(token_ids)
    num_seen = read_count(raw["num_seen_tokens"], "snapshot['num_seen_tokens']", num_tokens)
    policy = read_policy(raw["policy"], "snapshot['policy']")
    salt = raw["salt"]
    if not isinstance(salt, str) or len(salt) > 128 or len(salt) % 2 or set(salt) - set("0123456789abcdef"):
        raise fail("snapshot['salt']", salt, "hex digits are needed")
    logged = _labels(raw["labels"], num_seen, name, readout)
    num_undelivered = read_count(raw["num_undelivered"], "snapshot['num_undelivered']", len(logged))
    first = len(logged) - num_undelivered
    logged[first:] = [label._replace(stream_id=own_id) for label in logged[first:]]
    labels = make_labels(logged, token_ids, readout)
    state = StreamState(
        own_id,
        policy,
        [(-1, policy.start())],
        turns=_turns(raw["turns"], token_ids, chat),
        tenant=read_text(raw["tenant"], "snapshot['tenant']"),
        priority=read_count(raw["priority"], "snapshot['priority']", _MAX_PRIORITY, -_MAX_PRIORITY),
        salt=bytes.fromhex(salt),
        token_ids=token_ids,
        num_seen_tokens=num_seen,
        wanted=read_wanted(raw["wanted"], "snapshot['wanted']", num_seen, num_tokens),
    )
    _replay(state, labels, raw["failures"])
    return Restored(state, labels[first:])


# -- internals ---------------------------------------------------------------------------------------------


def _plain(snapshot: Any) -> dict[str, Any]:
    """A copy of nothing but JSON's own types: whatever the caller's objects do, they do it here."""
    try:
        copy = json.loads(json.dumps(snapshot, allow_nan=False))
    except (TypeError, ValueError, RecursionError, AttributeError) as error:
        raise ConfigError(f"snapshot: no JSON value ({error}); pass what Stream.snapshot returned") from None
    return read_object(copy, "snapshot", _KEYS)


def _check_origin(raw: dict[str, Any], fingerprint: Fingerprint) -> None:
    read_text(raw["format"], "snapshot['format']", (FORMAT,))
    version = read_count(raw["version"], "snapshot['version']", 2**31)
    if version != VERSION:
        raise ConfigError(
            f"snapshot['version']={version}: guardengine {__version__} reads version {VERSION}; it was written by "
            f"guardengine {raw['guardengine']!r}, use that"
        )
    read_text(raw["guardengine"], "snapshot['guardengine']")
    weights, own = read_text(raw["weights"], "snapshot['weights']"), fingerprint.weights()
    if weights != own:
        raise CheckpointError(
            f"snapshot['weights']={weights[:80]!r}: this engine's are {own}; load the checkpoint that the stream was "
            "opened with, or open a new stream from the snapshot's token_ids, to have all of it labelled anew"
        )
    numerics = read_object(raw["numerics"], "snapshot['numerics']", fingerprint.numerics._fields)
    for option, value in fingerprint.numerics._asdict().items():
        if numerics[option] != value:
            raise fail(
                f"snapshot['numerics'][{option!r}]",
                numerics[option],
                f"this engine has {option}={value!r}; load it with the snapshot's, as labels would differ otherwise",
            )


def _token_ids(value: Any, vocab_size: int) -> array[int]:
    if not isinstance(value, list):
        raise fail("snapshot['token_ids']", value, "a list is needed")
    try:
        return array("i", check_token_ids(value, vocab_size) if value else [])
    except InvalidTokens as error:
        raise ConfigError(f"snapshot['token_ids']: {error}") from None


def _turns(value: Any, token_ids: array[int], chat: ChatTemplate | None) -> tuple[Turn, ...] | None:
    if value is None:
        return None
    if chat is None:
        raise ConfigError(
            "snapshot['turns']: the stream was opened from messages, and this engine has no tokenizer.json to go on "
            "with its template; add it to the checkpoint's folder"
        )
    turns: list[Turn] = []

    def read(raw: Any, name: str) -> None:
        role, start, end, is_closed = read_row(raw, name, 4)
        previous = turns[-1] if turns else None
        need = ROLES if previous is not None and previous.role == "user" else ("user",)
        read_text(role, f"{name}[0]", need)
        if previous is None:
            read_count(start, f"{name}[1]", 0)
        else:
            read_count(start, f"{name}[1]", len(token_ids), previous.end + (previous.role == "user"))
        read_count(end, f"{name}[2]", len(token_ids) - (role == "user"), start)
        if not isinstance(is_closed, bool) or (role == "user" and not is_closed):
            raise fail(f"{name}[3]", is_closed, "true is needed, or false for a reply that may go on")
        if role == "user" and token_ids[end] != chat.end_of_turn_id:
            raise fail(f"{name}[2]", end, f"the id there is {token_ids[end]}, not <|im_end|>")
        turns.append(Turn(role, start, end, is_closed))

    read_list(value, "snapshot['turns']", read)
    if not turns or turns[-1].end + (turns[-1].role == "user") != len(token_ids):
        raise fail("snapshot['turns']", value, f"turns up to the last of {len(token_ids)} tokens are needed")
    return tuple(turns)


def _labels(value: Any, num_seen: int, stream_id: str, readout: Readout) -> list[LoggedLabel]:
    labels: list[LoggedLabel] = []

    def read(raw: Any, name: str) -> None:
        position, role, logits, *owner = read_row(raw, name, 3, 4)
        read_count(position, f"{name}[0]", num_seen - 1, labels[-1].position + 1 if labels else 0)
        read_text(role, f"{name}[1]", ROLES)
        check_logits(logits, f"{name}[2]", role, readout)
        labels.append(
            LoggedLabel(position, role, logits, read_text(owner[0], f"{name}[3]") if owner else stream_id)
        )

    read_list(value, "snapshot['labels']", read)
    return labels


def _replay(state: StreamState, labels: list[Label], raw_failures: Any) -> None:
    """Take the policy through the labels and the failures between them, in order."""
    failures: list[Failed] = []

    def read(raw: Any, name: str) -> None:
        position, failure, num_tokens = read_row(raw, name, 3)
        read_count(
            position, f"{name}[0]", state.num_seen_tokens - 1, failures[-1].position if failures else -1
        )
        read_text(failure, f"{name}[1]", ("error", "timeout", "overload"))
        failures.append(Failed(position, failure, read_count(num_tokens, f"{name}[2]", state.num_tokens)))

    read_list(raw_failures, "snapshot['failures']", read)
    labelled = {-1, *(label.position for label in labels)}
    for failed in failures:
        if failed.position not in labelled:
            raise fail("snapshot['failures']", list(failed), "it must name a label's position, or -1")
    # Of equal positions the label comes first: a failure is recorded after the newest label.
    events: list[Label | Failed] = [*labels, *failures]
    for event in sorted(events, key=lambda event: (event.position, isinstance(event, Failed))):
        if isinstance(event, Failed):
            state.record_failure(event)
        else:
            state.record(event)
