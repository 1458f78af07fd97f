"""Shared by the benchmark's commands: types of options, and exit statuses for errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from guardengine.errors import GuardEngineError, IntegrityError, LabelsDiffer


def count(text: str) -> int:
    """An option that is a whole number from 1 to 2**20."""
    if not text.isdecimal() or not 1 <= int(text) <= 2**20:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 to {2**20} is needed")
    return int(text)


def counts(text: str) -> list[int]:
    """An option that is a list of such numbers, with commas."""
    return [count(part.strip()) for part in text.split(",")]


def exit_status(command: Callable[[], None]) -> int:
    """Run a command. Returns 0; 2 for options that cannot be run; 1 when labels or books are wrong."""
    try:
        command()
    except GuardEngineError as error:
        say(f"guardengine.bench: {error}")
        return 1 if isinstance(error, LabelsDiffer | IntegrityError) else 2
    except KeyboardInterrupt:
        say("guardengine.bench: interrupted; nothing was written")
        return 130
    return 0


def say(text: str) -> None:
    """Print progress to stderr, so that stdout has the result only."""
    print(text, file=sys.stderr, flush=True)
