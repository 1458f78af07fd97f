"""Points on the command line: "16x256" is 16 streams with 256 tokens of context and 1 token each, "burst16" one stream
with 256 and 16 tokens at once, "prefill2048" a prompt of 2,048 tokens."""

from __future__ import annotations

import re

from guardengine.bench.compare import ComparePoint
from guardengine.errors import ConfigError

BURST_CONTEXT = 256
_LARGEST = 2**16
_PATTERN = re.compile(
    r"(?:(?P<streams>[1-9]\d*)x(?P<context>[1-9]\d*)|(?P<kind>burst|prefill)(?P<k>[1-9]\d*))"
)


def read_point(text: str) -> ComparePoint:
    """Raises ConfigError."""
    match = _PATTERN.fullmatch(text.strip())
    numbers = [int(part) for part in re.findall(r"\d+", text)]
    if match is None or max(numbers) > _LARGEST:
        raise ConfigError(
            f"point {text!r}: STREAMSxCONTEXT, burstTOKENS or prefillTOKENS is needed, numbers from 1 to {_LARGEST}"
        )
    if match["kind"]:
        return ComparePoint(1, BURST_CONTEXT if match["kind"] == "burst" else 0, int(match["k"]))
    return ComparePoint(int(match["streams"]), int(match["context"]))


def name_point(point: ComparePoint) -> str:
    """How a point is called in tables."""
    if not point.context_len:
        return f"prefill {point.k}"
    burst = f" + {point.k}" if point.k > 1 else ""
    return f"{point.num_streams} x {point.context_len}{burst}"
