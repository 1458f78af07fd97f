"""What `guardengine moderate` and `guardengine chat` print: verdicts, and text in the colours of its risks."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from guardengine.guarding.held import HeldItems

if TYPE_CHECKING:  # which brings numpy: a parser of a command line does without
    from guardengine.labels import Verdict

_RISKS = {"Safe": "32", "Controversial": "33", "Unsafe": "31"}  # ANSI colours
_ACTIONS = {"allow": "32", "flag": "33", "block": "31"}


class Printer:
    """Lines for people, coloured on a terminal, or JSON lines."""

    def __init__(self, out: TextIO, as_json: bool, color: str) -> None:
        self._out, self.as_json = out, as_json
        is_wanted = out.isatty() and "NO_COLOR" not in os.environ if color == "auto" else color == "always"
        self.is_colored = is_wanted and not as_json

    def prompt(self, label: dict[str, Any] | None) -> None:
        if self.as_json:
            self.line({"type": "prompt", "label": label})
        elif label is None:
            self.line("prompt: not judged")
        else:
            probability = label["risk_probs"][label["risk"]]
            category = "" if label["risk"] == "Safe" else f", {label['category']}"
            self.line(f"prompt: {self.colored(label['risk'], _RISKS)}{category} ({_percent(probability)})")

    def verdict(self, verdict: Verdict) -> None:
        if self.as_json:
            self.line({"type": "verdict", "verdict": asdict(verdict)})
            return
        why = "" if verdict.action == "allow" else f" {verdict.risk}"
        if verdict.category is not None:
            why += f", {verdict.category}"
        self.line(f"verdict: {self.colored(verdict.action, _ACTIONS)}{why} (rule {verdict.rule})")

    def colored(self, text: str, colors: dict[str, str], name: str | None = None) -> str:
        color = colors.get(name or text)
        return f"\x1b[{color}m{text}\x1b[0m" if self.is_colored and color else text

    def line(self, what: Any) -> None:
        self.write(f"{json.dumps(what) if self.as_json else what}\n")

    def write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def end(self) -> None:
        if not self.as_json:
            self.write("\n")


class Token(NamedTuple):
    """A token of a reply: how many characters of the reply there are up to its end, and its risk."""

    end: int
    risk: str


class JudgedText:
    """A reply as it is judged: tokens in the colours of their risks; without colours, risks other than Safe beside.

    `text` is all that came, `shown` what was shown of it.
    """

    def __init__(self, printer: Printer) -> None:
        self._printer = printer
        self.text, self._num_shown, self._num_labelled = "", 0, 0  # characters
        self._held = HeldItems[Token]()

    @property
    def shown(self) -> str:
        return self.text[: self._num_shown]

    def add(self, piece: str, labels: Sequence[dict[str, Any]]) -> None:
        """Hold more of the reply, and the labels that came of it. As JSON, labels are printed at once."""
        self.text += piece
        for label in labels:
            if self._printer.as_json:
                self._printer.line({"type": "label", "label": label})
                continue
            end = max(self._num_labelled, label["span"]["end_char"])
            self._held.add(Token(end, label["risk"]), end - self._num_labelled)
            self._num_labelled = end

    def take(self, end: int) -> list[Token]:
        """The tokens that lie within the first `end` characters and were not taken."""
        return self._held.take(end)

    def rest(self) -> list[Token]:
        """All that were not taken."""
        return self._held.rest()

    def show(self, token: Token) -> None:
        """Print the text up to a token's end."""
        text = printable(self.text[self._num_shown : token.end])
        self._num_shown = token.end
        self._printer.write(self._mark(text, token.risk))

    def _mark(self, text: str, risk: str) -> str:
        if not self._printer.is_colored:
            return text if risk == "Safe" or not text else f"{text}[{risk[0]}]"
        return self._printer.colored(text, _RISKS, risk) if text else ""


def printable(text: str) -> str:
    """Without what a terminal would obey, which is not ours to pass on."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _percent(probability: float | None) -> str:
    return "unknown" if probability is None else f"{probability:.1%}"
