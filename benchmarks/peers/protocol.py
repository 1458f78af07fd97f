"""The worker's half of the protocol: JSON lines on stdin and stdout around one contender. Standard library only,
since every peer has an interpreter of its own.

A line asks ({"command": ..., fields}), a line answers ({"result": ...} or {"error": "..."}):
load     make the contender from `options`; the answer is what it says of itself
check    greedy next token after each of `sequences`; the answer lets the orchestrator see that it is the same model
prepare  have streams with `prompts` computed; an empty prompt is a stream that has nothing yet
advance  feed the next tokens `chunks`, one list a stream; the answer is how long that took, measured here
At the end of stdin the worker leaves. Between lines it sleeps in a read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

Chunks = Sequence[Sequence[int]]  # ids for each stream


class Contender(Protocol):
    """One engine with one setting."""

    def describe(self) -> dict[str, Any]:
        """Versions and the settings that were really taken, for the record."""
        ...

    def check(self, sequences: Chunks) -> list[int] | None:
        """The likeliest next token after each sequence; None where there is no language model head."""
        ...

    def prepare(self, prompts: Chunks) -> None:
        """Drop the streams there are; open these and compute their prompts."""
        ...

    def advance(self, chunks: Chunks) -> list[int]:
        """Feed every stream its next tokens and read the results: all of them for streams with a prompt, the last
        for streams without (that is a prompt itself). Returns the winning class of each stream's last token."""
        ...


def serve(load: Callable[[dict[str, Any]], Contender]) -> None:
    """Answer lines until stdin ends. An exception of the contender is an answer, not the end."""
    # Libraries print to stdout as they like: it becomes stderr, and the answers keep the pipe for themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    contender: Contender | None = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if message["command"] == "load":
                contender = load(message["options"])
                result: Any = contender.describe()
            elif contender is None:
                raise RuntimeError(f"`{message['command']}` came before `load`; load first")
            else:
                result = _do(contender, message)
            answer = {"result": result}
        except Exception as error:  # whatever a peer raises is its result
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    # Straight out: a peer's own shutdown may hang or crash, and nothing is left to save.
    os._exit(0)


def _do(contender: Contender, message: dict[str, Any]) -> Any:
    if message["command"] == "check":
        return contender.check(message["sequences"])
    if message["command"] == "prepare":
        contender.prepare(message["prompts"])
        return None
    if message["command"] == "advance":
        chunks = message["chunks"]
        start = time.perf_counter()
        winners = contender.advance(chunks)
        seconds = time.perf_counter() - start
        if len(winners) != len(chunks):
            raise RuntimeError(f"{len(winners)} results came for {len(chunks)} streams")
        return {"seconds": seconds}
    raise ValueError(f"command {message['command']!r}: load, check, prepare or advance is needed")
