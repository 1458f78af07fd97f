"""The `guardengine` command: its parser, and the way from a command's name to the function that runs it.

Nothing here or in the commands' files imports torch, or any other heavy package, before a command runs: help comes at
once, and so does what a command answers without an engine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from guardengine._version import __version__
from guardengine.cli import (
    annotate,
    chat,
    evaluate,
    make_checkpoint,
    moderate,
    proxy,
    ray_serve,
    replay,
    serve,
    verify_quantization,
)
from guardengine.errors import GuardEngineError

# In the order in which `guardengine --help` lists them.
_COMMANDS = (
    make_checkpoint,
    verify_quantization,
    replay,
    evaluate,
    annotate,
    serve,
    proxy,
    ray_serve,
    moderate,
    chat,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `guardengine` with all its commands.

    Returns:
        The parser. What it parses has `run`: a function that takes the parsed arguments and returns the exit status.
    """
    parser = argparse.ArgumentParser(
        prog="guardengine",
        description="Streaming safety moderation with Qwen3Guard. The benchmark is `python -m guardengine.bench`.",
    )
    parser.add_argument("--version", action="version", version=f"guardengine {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after `guardengine`. None: those of this process.

    Returns:
        The exit status: 0; 1 where a check has failed; or 2, with the reason on stderr.
    """
    arguments = build_parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return command(arguments)
    except GuardEngineError as error:
        print(f"guardengine: {error}", file=sys.stderr)
        return 2
