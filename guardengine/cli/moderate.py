"""`guardengine moderate`: judge a text, or a reply while it comes in on stdin."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardengine.cli.options import Commands, add_engine_options, engine_options
from guardengine.errors import ConfigError
from guardengine.extras import check_installed
from guardengine.terminal.printer import JudgedText, Printer

if TYPE_CHECKING:
    from guardengine.integrations.judges import Judge

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


def judge_of(arguments: argparse.Namespace, *, has_scores: bool, reconnect_s: float) -> Judge:
    """Who judges, as `add_judge`'s options say. reconnect_s: for how long a lost server is sought."""
    from guardengine.integrations.judges import EngineJudge, ServerJudge

    policy: dict[str, Any] = {"preset": arguments.policy}
    if arguments.debounce is not None:
        policy["debounce"] = arguments.debounce
    if arguments.url is not None:
        key = os.environ.get(KEY_VARIABLE)
        return ServerJudge(
            arguments.url, api_key=key, policy=policy, has_scores=has_scores, reconnect_s=reconnect_s
        )
    check_installed(f"guardengine {arguments.command} --checkpoint", "engine")
    options = {"revision": arguments.revision, **engine_options(arguments)}
    return EngineJudge.load(arguments.checkpoint, options, policy=policy, has_scores=has_scores)


def _run(arguments: argparse.Namespace) -> int:
    from guardengine.integrations.own_loop import in_loop

    if arguments.text is not None and arguments.file is not None:
        raise ConfigError("TEXT and --file were both given; use one of them")
    pieces = _pieces(arguments)
    is_reply = arguments.prompt is not None
    prompt = arguments.prompt if is_reply else "".join(pieces)
    with ExitStack() as stack:
        judge = judge_of(arguments, has_scores=True, reconnect_s=30.0)
        stack.callback(lambda: in_loop(judge.close()))
        stream = in_loop(judge.open([{"role": "user", "content": prompt}]))
        stack.callback(lambda: in_loop(stream.close()))
        printer = Printer(sys.stdout, arguments.json, arguments.color)
        printer.prompt(stream.prompt)
        if is_reply:
            reply = JudgedText(printer)
            for piece in pieces:
                _show(reply, piece, in_loop(stream.append(piece)))
            _show(reply, "", in_loop(stream.finish()))
            printer.end()
        printer.verdict(stream.verdict)
        return 0 if stream.verdict.action == "allow" else 1


def _show(reply: JudgedText, piece: str, labels: list[dict[str, Any]]) -> None:
    reply.add(piece, labels)
    for token in reply.rest():
        reply.show(token)


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
