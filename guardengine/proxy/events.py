"""Server-sent events, read strictly and kept byte for byte.

What one parser ignores and another reads (unknown fields, a byte order mark, line breaks of Unicode) is refused: the
client must not find text where the guard saw none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from guardengine.proxy.errors import UpstreamError, broken

# A lone carriage return at the end of what has come may be the first half of "\r\n".
_LINE_END = rb"(?:\r\n|\n|\r(?=[^\n]))"
_EVENT_END = re.compile(_LINE_END + _LINE_END)
_LINES = re.compile(rb"\r\n|\n|\r")
_LONGEST_END = 4


class Event(NamedTuple):
    """raw: its bytes, the empty line at its end included. data: None where it has none, as in comments."""

    raw: bytes
    data: bytes | None


class EventReader:
    """Takes bytes as they come, hands out whole events."""

    def __init__(self, max_event_bytes: int) -> None:
        self._max = max_event_bytes
        self._buffer = bytearray()

    def add(self, chunk: bytes) -> Iterator[Event]:
        """The events that are complete by now. Raises UpstreamError for one that is too large or read in two ways."""
        buffer, start = self._buffer, 0
        look_from = max(0, len(buffer) - _LONGEST_END)
        buffer += chunk
        while found := _EVENT_END.search(buffer, look_from):
            raw = bytes(buffer[start : found.end()])
            start = look_from = found.end()
            self._check_size(len(raw))
            yield Event(raw, _data(raw))
        del buffer[:start]
        self._check_size(len(buffer))

    def finish(self) -> Iterator[Event]:
        """The last one, whose end only the end of everything shows. Raises UpstreamError for half an event."""
        raw, self._buffer = bytes(self._buffer), bytearray()
        if not raw.strip(b"\r\n"):
            return
        if not raw.endswith((b"\r\r", b"\n\r", b"\n\n", b"\r\n\r\n")):
            raise UpstreamError(
                "the upstream's stream ended within an event; nothing more of its reply is shown",
                "upstream_truncated",
            )
        yield Event(raw, _data(raw))

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max:
            raise broken(f"an event larger than max_event_bytes={self._max}")


def _data(raw: bytes) -> bytes | None:
    lines: list[bytes] = []
    for line in _LINES.split(raw):
        if not line:
            continue
        name, colon, value = line.partition(b":")
        if name == b"data" and colon:
            lines.append(value.removeprefix(b" "))
        elif not colon or name not in (b"", b"event", b"id", b"retry"):
            raise broken("a line that is no field of a server-sent event")
        elif len(_text(line).splitlines()) > 1:
            raise broken("a line that some parsers read as two")
    return b"\n".join(lines) if lines else None


def _text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise broken("a line that is not UTF-8") from None
