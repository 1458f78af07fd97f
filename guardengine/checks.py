"""Checks of single options at the boundaries: each returns the value, or raises ConfigError with the option's name, the
value, the limit and what to pass instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

from guardengine.errors import ConfigError

T = TypeVar("T")


def is_whole_number(value: Any, smallest: int, largest: int | None = None) -> TypeGuard[int]:
    """Whether a value is a whole number from `smallest` to `largest`. True and False are no numbers here, nor is 2.0 a
    whole one. For checks with an error of their own; `whole_number` raises the usual one."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return smallest <= value and (largest is None or value <= largest)


def whole_number(name: str, value: Any, smallest: int, largest: int | None = None) -> int:
    """Check a whole number.

    Args:
        name: The option, for the error.
        value: Anything. True and False are no numbers here, 2.0 is no whole number.
        smallest: The least value that is allowed.
        largest: The greatest value that is allowed; None where there is none.

    Raises:
        ConfigError: It is not a whole number from `smallest` to `largest`.
    """
    if not is_whole_number(value, smallest, largest):
        to = "" if largest is None else f" to {largest}"
        raise ConfigError(f"{name}={value!r}: pass a whole number from {smallest}{to}")
    return value


def number(name: str, value: Any, low: float, below: float, *, includes_low: bool = True) -> float:
    """Check a real number.

    Args:
        name: The option, for the error.
        value: Anything. True and False are no numbers here, nor is NaN.
        low: Where the allowed values begin.
        below: Where they end; this value itself is not allowed.
        includes_low: Whether `low` itself is allowed.

    Raises:
        ConfigError: It is not a number in that range.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value < below or (value == low and not includes_low):
        start = "from" if includes_low else "above"
        raise ConfigError(f"{name}={value!r}: pass a number {start} {low:g} and below {below:g}")
    return value  # type: ignore[no-any-return]


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """Check one of a few strings.

    Args:
        name: The option, for the error.
        value: Anything.
        allowed: The values that are allowed.

    Raises:
        ConfigError: It is none of them.
    """
    if not isinstance(value, str) or value not in allowed:
        *others, last = map(repr, allowed)
        either = f"{', '.join(others)} or {last}" if others else last
        raise ConfigError(f"{name}={value!r:.80}: choose {either}")
    return value


def probability(name: str, value: Any) -> float:
    """Check a probability.

    Args:
        name: The option, for the error.
        value: Anything.

    Raises:
        ConfigError: It is not a number from 0 to 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name}={value!r}: pass a probability from 0 to 1")
    return float(value)


def names(option: str, value: Any) -> tuple[str, ...]:
    """Check a collection of names.

    Args:
        option: The option, for the error.
        value: Anything; a single string is no collection of names.

    Raises:
        ConfigError: It is not an iterable of non-empty strings.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"{option}={value!r}: pass a list of names, such as ['Safe']")
    checked = tuple(value)
    for name in checked:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{option} contains {name!r}: names are non-empty strings")
    return checked


def by_name(option: str, value: Any, check: Callable[[str, Any], T]) -> dict[str, T]:
    """Check a mapping from names to values.

    Args:
        option: The option, for the error.
        value: Anything.
        check: Called with `option[name]` and the value of each name; returns the value to keep.

    Raises:
        ConfigError: It is no mapping, a key is not a non-empty string, or `check` refuses a value.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{option}={value!r}: pass a dict whose keys are names")
    return {name: check(f"{option}[{name!r}]", value[name]) for name in names(option, value)}
