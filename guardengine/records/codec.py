"""Records: policies, labels and books as plain JSON values and back. What snapshots and audit logs share.

Writing trusts the engine; reading trusts nothing: what is not of the right form raises ConfigError with the name
that the caller gives it. Logits are kept as the hex digits of their little-endian float32 bytes, risk classes
first, so that they come back exactly, NaN included. No torch.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt

from guardengine import checks
from guardengine.core.readout import Reading, Readout
from guardengine.core.state import Wanted
from guardengine.errors import ConfigError
from guardengine.labels import Label, Role, Verdict
from guardengine.policy import Policy

ROLES = ("user", "assistant")
T = TypeVar("T")


class LoggedLabel(NamedTuple):
    """A label of which only what the model said was kept."""

    position: int
    role: Role
    logits: str
    stream_id: str


# -- writing -----------------------------------------------------------------------------------------------


def logits_record(label: Label) -> str:
    """A label's logits, the risk classes' first."""
    return (label.risk_logits.tobytes() + label.category_logits.tobytes()).hex()


def wanted_record(wanted: Iterable[Wanted]) -> list[list[Any]]:
    """Wanted labels as runs [role, first position, end position]."""
    runs: list[list[Any]] = []
    for position, role in wanted:
        if runs and runs[-1][0] == role and runs[-1][2] == position:
            runs[-1][2] = position + 1
        else:
            runs.append([role, position, position + 1])
    return runs


def policy_record(policy: Policy) -> dict[str, Any]:
    """Every option of a policy."""
    record = {option.name: getattr(policy, option.name) for option in fields(policy)}
    return {name: sorted(value) if isinstance(value, frozenset) else value for name, value in record.items()}


def verdict_record(verdict: Verdict) -> dict[str, Any]:
    """What was decided, without how much is cleared."""
    return {
        "action": verdict.action,
        "risk": verdict.risk,
        "category": verdict.category,
        "position": verdict.position,
        "rule": verdict.rule,
    }


# -- reading -----------------------------------------------------------------------------------------------


def fail(name: str, value: Any, need: str) -> ConfigError:
    """The error for a value that is not what is needed."""
    return ConfigError(f"{name}={reprlib.repr(value)}: {need}")


def read_object(value: Any, name: str, keys: Collection[str]) -> dict[str, Any]:
    """An object with exactly these keys."""
    if not isinstance(value, dict):
        raise fail(name, value, "an object is needed")
    missing, unknown = sorted(set(keys) - value.keys()), sorted(value.keys() - set(keys))
    if missing or unknown:
        problem = (
            f"the key {missing[0]!r} is missing" if missing else f"the key {unknown[0][:80]!r} is unknown"
        )
        raise ConfigError(f"{name}: {problem}; take it as guardengine wrote it")
    return value


def read_count(value: Any, name: str, largest: int, least: int = 0) -> int:
    """A whole number from `least` to `largest`."""
    if not checks.is_whole_number(value, least, largest):
        raise fail(name, value, f"a whole number from {least} to {largest} is needed")
    return value


def read_text(value: Any, name: str, allowed: Sequence[str | None] | None = None) -> Any:
    """A string, or one of the allowed values."""
    if (not isinstance(value, str)) if allowed is None else (value not in allowed):
        raise fail(
            name, value, "a string is needed" if allowed is None else f"one of {list(allowed)} is needed"
        )
    return value


def read_list(value: Any, name: str, read: Callable[[Any, str], T]) -> list[T]:
    """A list, each item read by `read`."""
    if not isinstance(value, list):
        raise fail(name, value, "a list is needed")
    return [read(item, f"{name}[{index}]") for index, item in enumerate(value)]


def read_row(value: Any, name: str, *sizes: int) -> list[Any]:
    """A list of one of these lengths."""
    if not isinstance(value, list) or len(value) not in sizes:
        raise fail(name, value, f"a list of {' or '.join(map(str, sizes))} values is needed")
    return value


def read_wanted(value: Any, name: str, start: int, end: int) -> list[Wanted]:
    """Runs of wanted labels, in ascending order, at positions start..end-1."""
    wanted: list[Wanted] = []

    def read(run: Any, name: str) -> None:
        role, first, last = read_row(run, name, 3)
        read_text(role, f"{name}[0]", ROLES)
        least = wanted[-1].position + 1 if wanted else start
        read_count(first, f"{name}[1]", end - 1, least)
        read_count(last, f"{name}[2]", end, first + 1)
        wanted.extend(Wanted(position, role) for position in range(first, last))

    read_list(value, name, read)
    return wanted


def read_policy(value: Any, name: str) -> Policy:
    """A policy with all of its options. Names are to be checked against the model's."""
    options = read_object(value, name, [option.name for option in fields(Policy)])
    try:
        return Policy(**options)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    except (TypeError, ValueError, RecursionError) as error:  # values that cannot even be printed or hashed
        raise ConfigError(f"{name}: no policy can be made of this ({type(error).__name__})") from None


def check_logits(value: Any, name: str, role: Role, readout: Readout) -> str:
    """The logits of a label of `role`, as `logits_record` writes them."""
    columns = readout.columns[role]
    num_digits = 8 * (len(columns.risks) + len(columns.categories))
    if not isinstance(value, str) or len(value) != num_digits or set(value) - set("0123456789abcdef"):
        raise fail(
            name, value, f"{num_digits} hex digits are needed, 8 for each class of the model's {role} heads"
        )
    return value


def read_logits(text: str) -> npt.NDArray[np.float32]:
    """The logits behind checked hex digits."""
    return np.frombuffer(bytes.fromhex(text), dtype="<f4")


def make_labels(logged: Sequence[LoggedLabel], token_ids: Sequence[int], readout: Readout) -> list[Label]:
    """The labels again: names and probabilities come from the logits as they did at first."""
    width = max(columns.category.stop for columns in readout.columns.values())
    logits = np.zeros((len(logged), width), dtype=np.float32)
    for row, (_, role, text, _) in zip(logits, logged, strict=True):
        columns = readout.columns[role]
        row[columns.risk.start : columns.category.stop] = read_logits(text)
    readings = [
        Reading(row, label.stream_id, label.role, label.position, token_ids[label.position])
        for row, label in enumerate(logged)
    ]
    return readout.labels(readings, logits, readout.probabilities(logits))


def read_verdict(value: Any, name: str) -> Mapping[str, Any]:
    """A verdict as `verdict_record` writes it."""
    return cast(
        Mapping[str, Any], read_object(value, name, ("action", "risk", "category", "position", "rule"))
    )
