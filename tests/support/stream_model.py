"""What a stream should be, kept beside the engine by tests of random operations."""

from __future__ import annotations

from dataclasses import dataclass, field

from guardengine import Label


@dataclass
class Model:
    """What a stream should be: its ids, which labels it owes or has given, and until when which ids are due."""

    tenant: str = ""
    ids: list[int] = field(default_factory=list)
    owed: list[tuple[int, str]] = field(default_factory=list)
    given: list[Label] = field(default_factory=list)
    due: list[tuple[float, int, int]] = field(default_factory=list)  # time, start, end

    def feed(self, ids: list[int], role: str, due: float | None = None) -> None:
        start, end = len(self.ids), len(self.ids) + len(ids)
        self.ids += ids
        self.owed += [(end - 1, role)] if role == "user" else [(p, role) for p in range(start, end)]
        if due is not None:
            self.due.append((due, start, end))

    def cut(self, num_tokens: int) -> None:
        length = len(self.ids) - num_tokens
        self.ids = self.ids[:length]
        self.owed = [x for x in self.owed if x[0] < length]
        self.given = [x for x in self.given if x.position < length]
        self.due = [(time, start, min(end, length)) for time, start, end in self.due if start < length]

    def settle(self, delivered: list[Label]) -> None:
        """These labels have left the engine, one way or the other."""
        self.given = delivered
        known = {(label.position, label.role) for label in delivered}
        self.owed = [x for x in self.owed if x not in known]
