"""`guardengine moderate`: judge a text, or a reply while it comes in on stdin."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guardengine.cli.options import Commands, add_engine_options, engine_options
from guardengine.errors import ConfigError
from guardengine.terminal.printer import JudgedText, Printer

KEY_VARIABLE = "GUARDENGINE_API_KEY"


def add_command(commands: Commands) -> None:
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
    add_judge(moderator)
    moderator.add_argument("--json", action="store_true", help="print JSON lines: prompt, labels, verdict")
    moderator.set_defaults(run=_run)


def add_judge(parser: argparse.ArgumentParser) -> None:
    """Add the options of who judges, how, and how it is shown."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="of `guardengine serve`; its API key is read from GUARDENGINE_API_KEY")
    where.add_argument("--checkpoint", metavar="CHECKPOINT", help="Stream: a folder or hub id, loaded here")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--policy", choices=("strict", "loose"), default="strict")
    parser.add_argument("--debounce", type=int, metavar="N", help="tokens in a row that decide")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    engine = parser.add_argument_group("engine, with --checkpoint")
    add_engine_options(engine, "device", "backend", "dtype", "quantization", "num_threads")


def policy_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The policy that `add_judge`'s options say, as the protocol has it."""
    policy: dict[str, Any] = {"preset": arguments.policy}
    if arguments.debounce is not None:
        policy["debounce"] = arguments.debounce
    return policy


def _run(arguments: argparse.Namespace) -> int:
    if arguments.text is not None and arguments.file is not None:
        raise ConfigError("TEXT and --file were both given; use one of them")
    policy = policy_of(arguments)
    pieces = _pieces(arguments)
    is_reply = arguments.prompt is not None
    prompt = arguments.prompt if is_reply else "".join(pieces)
    with _judge(arguments, [{"role": "user", "content": prompt}], policy) as stream:
        printer = Printer(sys.stdout, arguments.json, arguments.color)
        printer.prompt(stream.prompt)
        if is_reply:
            shown = JudgedText(printer)
            for piece in pieces:
                shown.add(piece, stream.append(piece))
            shown.add("", stream.finish())
            printer.end()
        printer.verdict(stream.verdict)
        return 0 if stream.verdict["action"] == "allow" else 1


def _judge(arguments: argparse.Namespace, messages: list[dict[str, str]], policy: dict[str, Any]) -> Any:
    from guardengine.terminal import judges

    if arguments.url is not None:
        return judges.served(arguments.url, os.environ.get(KEY_VARIABLE), messages, policy)
    options = {"revision": arguments.revision, **engine_options(arguments)}
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
