"""What `guardengine moderate` and `guardengine chat` print: verdicts, and text in the colours of its risks."""

from __future__ import annotations

import json
import os
from typing import Any, TextIO

from guardengine.guarding.held import HeldItems

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

    def verdict(self, verdict: dict[str, Any]) -> None:
        if self.as_json:
            self.line({"type": "verdict", "verdict": verdict})
            return
        why = "" if verdict["action"] == "allow" else f" {verdict['risk']}"
        if verdict["category"] is not None:
            why += f", {verdict['category']}"
        self.line(f"verdict: {self.colored(verdict['action'], _ACTIONS)}{why} (rule {verdict['rule']})")

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


class JudgedText:
    """A reply as it is judged: tokens in the colours of their risks; without colours, risks other than Safe beside.

    is_guarded: only what is cleared is shown. `shown` is what was shown, `text` all that came.
    """

    def __init__(self, printer: Printer, *, is_guarded: bool = False) -> None:
        self._printer, self._is_guarded = printer, is_guarded
        self.text, self._num_shown, self._num_labelled = "", 0, 0  # characters
        self._held = HeldItems[tuple[int, str]]()  # where a token ends in the text, and its risk

    @property
    def shown(self) -> str:
        return self.text[: self._num_shown]

    def add(self, piece: str, update: Any, *, is_over: bool = False) -> None:
        """Take in more of the reply, and what came of it. is_over: there is nothing left to wait for."""
        self.text += piece
        for label in update.labels:
            if self._printer.as_json:
                self._printer.line({"type": "label", "label": label})
                continue
            end = max(self._num_labelled, label["span"]["end_char"])
            self._held.add((end, label["risk"]), end - self._num_labelled)
            self._num_labelled = end
        is_held = self._is_guarded and (not is_over or update.verdict["action"] == "block")
        for end, risk in self._held.take(update.cleared_chars) if is_held else self._held.rest():
            text = printable(self.text[self._num_shown : end])
            self._num_shown = end
            self._printer.write(self._mark(text, risk))

    def _mark(self, text: str, risk: str) -> str:
        if not self._printer.is_colored:
            return text if risk == "Safe" or not text else f"{text}[{risk[0]}]"
        return self._printer.colored(text, _RISKS, risk) if text else ""


def printable(text: str) -> str:
    """Without what a terminal would obey, which is not ours to pass on."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _percent(probability: float | None) -> str:
    return "unknown" if probability is None else f"{probability:.1%}"
