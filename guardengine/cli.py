"""The `guardengine` command: thin wrappers around the library."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from guardengine._version import __version__
from guardengine.errors import GuardEngineError
from guardengine.make_checkpoint import PRESETS, make_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="guardengine",
        description="Streaming safety moderation with Qwen3Guard. The benchmark is `python -m guardengine.bench`.",
    )
    parser.add_argument("--version", action="version", version=f"guardengine {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    maker = commands.add_parser(
        "make-checkpoint",
        help="write a checkpoint with random weights",
        description="Write a checkpoint with random weights in the released layout, for machines without weights.",
    )
    maker.add_argument("directory", type=Path, metavar="DIR", help="new or empty folder")
    maker.add_argument("--preset", required=True, choices=sorted(PRESETS))
    maker.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        make_checkpoint(arguments.directory, arguments.preset, seed=arguments.seed, progress=True)
    except GuardEngineError as error:
        print(f"guardengine: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.preset} to {arguments.directory}")
    return 0
