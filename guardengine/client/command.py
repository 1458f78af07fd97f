"""`guardengine moderate`: judge a text, or a reply while it comes in on stdin."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from guardengine.errors import ConfigError

_KEY_VARIABLE = "GUARDENGINE_API_KEY"
_RISKS = {"Safe": "32", "Controversial": "33", "Unsafe": "31"}  # ANSI colours
_ACTIONS = {"allow": "32", "flag": "33", "block": "31"}


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `guardengine`."""
    moderator = commands.add_parser(
        "moderate",
        help="judge a text, or a reply while it comes in",
        description="Judge a prompt: TEXT, a --file, stdin. With --prompt the text is the reply to it, judged by "
        "token, from stdin while it comes in. Exits with 0 where the policy allows it, 1 where it flags or blocks, and "
        "2 for errors.",
    )
    moderator.add_argument("text", nargs="?", metavar="TEXT", help="-, or nothing: stdin")
    moderator.add_argument("--file", type=Path, metavar="FILE", help="instead of TEXT")
    moderator.add_argument("--prompt", metavar="TEXT", help="what the text is the reply to")
    where = moderator.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="of `guardengine serve`; its API key is read from GUARDENGINE_API_KEY")
    where.add_argument("--checkpoint", metavar="CHECKPOINT", help="Stream: a folder or hub id, loaded here")
    moderator.add_argument("--revision", help="of a hub id")
    moderator.add_argument("--backend", default="auto", help="with --checkpoint (default: %(default)s)")
    moderator.add_argument("--policy", choices=("strict", "loose"), default="strict")
    moderator.add_argument("--debounce", type=int, metavar="N", help="tokens in a row that decide")
    moderator.add_argument("--json", action="store_true", help="print JSON lines: prompt, labels, verdict")
    moderator.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    moderator.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.text is not None and arguments.file is not None:
        raise ConfigError("TEXT and --file were both given; use one of them")
    policy: dict[str, Any] = {"preset": arguments.policy}
    if arguments.debounce is not None:
        policy["debounce"] = arguments.debounce
    pieces = _pieces(arguments)
    is_reply = arguments.prompt is not None
    prompt = arguments.prompt if is_reply else "".join(pieces)
    with _judge(arguments, [{"role": "user", "content": prompt}], policy) as stream:
        printer = _Printer(sys.stdout, arguments.json, arguments.color)
        printer.prompt(stream.prompt)
        if is_reply:
            shown = _Text(printer)
            for piece in pieces:
                shown.add(piece, stream.append(piece))
            shown.add("", stream.finish())
            printer.end()
        printer.verdict(stream.verdict)
        return 0 if stream.verdict["action"] == "allow" else 1


def _judge(arguments: argparse.Namespace, messages: list[dict[str, str]], policy: dict[str, Any]) -> Any:
    from guardengine.client import judges

    if arguments.url is not None:
        return judges.served(arguments.url, os.environ.get(_KEY_VARIABLE), messages, policy)
    options = {"revision": arguments.revision, "backend": arguments.backend}
    return judges.in_process(arguments.checkpoint, messages, policy, **options)


def _pieces(arguments: argparse.Namespace) -> Iterator[str]:
    """The text, stdin's as it comes in."""
    if arguments.file is not None:
        try:
            yield arguments.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{arguments.file} cannot be read as UTF-8 text: {type(error).__name__}"
            ) from None
    elif arguments.text not in (None, "-"):
        yield arguments.text
    else:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while piece := os.read(sys.stdin.fileno(), 2**16):
            if text := decoder.decode(piece):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text


class _Printer:
    """Lines for people, coloured on a terminal, or JSON lines."""

    def __init__(self, out: TextIO, as_json: bool, color: str) -> None:
        self._out, self.as_json = out, as_json
        is_wanted = out.isatty() and "NO_COLOR" not in os.environ if color == "auto" else color == "always"
        self._is_colored = is_wanted and not as_json

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
        return f"\x1b[{color}m{text}\x1b[0m" if self._is_colored and color else text

    def line(self, what: Any) -> None:
        self.write(f"{json.dumps(what) if self.as_json else what}\n")

    def write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def end(self) -> None:
        if not self.as_json:
            self.write("\n")


class _Text:
    """A reply as it is judged: tokens in the colours of their risks; without colours, risks other than Safe beside."""

    def __init__(self, printer: _Printer) -> None:
        self._printer, self._text, self._at = printer, "", 0

    def add(self, piece: str, update: Any) -> None:
        self._text += piece
        printer = self._printer
        for label in update.labels:
            if printer.as_json:
                printer.line({"type": "label", "label": label})
                continue
            end = max(self._at, label["span"]["end_char"])
            # What a terminal would obey is not ours to pass on.
            text = "".join(
                c if c.isprintable() or c == "\n" else "\ufffd" for c in self._text[self._at : end]
            )
            self._at = end
            risk = label["risk"]
            printer.write(self._mark(text, risk))

    def _mark(self, text: str, risk: str) -> str:
        if not self._printer._is_colored:
            return text if risk == "Safe" or not text else f"{text}[{risk[0]}]"
        return self._printer.colored(text, _RISKS, risk) if text else ""


def _percent(probability: float | None) -> str:
    return "unknown" if probability is None else f"{probability:.1%}"
