"""StepTimes: how many tokens a step may have to stay within a time, learned from the steps that ran."""

from __future__ import annotations

from collections import deque
from statistics import median

_REMEMBERED = 8  # steps of a size: enough that one hiccup is not the median
_LEAST = 16  # tokens that a step may always have: what a CPU or GPU computes at nearly the cost of one
# Steps: what larger ones took is forgotten bit by bit, or one hiccup would rule them out for ever.
_FORGET_EVERY = 64
_GROWTH = 2  # steps larger than any that ran grow by this much at a time


class StepTimes:
    """Seconds that recent steps took, by size: tokens rounded to a power of two."""

    def __init__(self) -> None:
        self._steps: dict[int, deque[tuple[int, float]]] = {}
        self._num_steps = 0

    def observe(self, num_tokens: int, seconds: float) -> None:
        steps = self._steps.setdefault(num_tokens.bit_length(), deque(maxlen=_REMEMBERED))
        steps.append((num_tokens, seconds))
        self._num_steps += 1
        if self._num_steps % _FORGET_EVERY == 0:
            for size in [size for size in self._steps if size > num_tokens.bit_length()]:
                self._steps[size].popleft()
                if not self._steps[size]:
                    del self._steps[size]

    def tokens_within(self, seconds: float) -> int:
        """The largest step that is expected to take no longer; at least 16 tokens.

        Between two sizes that ran time is taken to be linear in tokens, and beyond the largest as well, for at most
        twice its tokens: nothing is known of larger ones.
        """
        below: tuple[float, float] | None = None
        for size in sorted(self._steps):
            tokens = median(n for n, _ in self._steps[size])
            took = median(t for _, t in self._steps[size])
            if took > seconds:
                if below is None:
                    return max(_LEAST, int(tokens * seconds / took))
                share = (seconds - below[1]) / (took - below[1])
                return max(_LEAST, int(below[0] + share * (tokens - below[0])))
            below = (tokens, took)
        if below is None:
            return _LEAST
        tokens, took = below
        return max(_LEAST, int(tokens * min(_GROWTH, seconds / took if took else _GROWTH)))
