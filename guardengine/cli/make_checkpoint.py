"""`guardengine make-checkpoint`: random weights in the released layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from guardengine.checkpoint.presets import PRESETS
from guardengine.cli.options import Commands
from guardengine.extras import check_installed


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `guardengine`."""
    maker = commands.add_parser(
        "make-checkpoint",
        help="write a checkpoint with random weights",
        description="Write a checkpoint with random weights in the released layout, for machines without weights.",
    )
    maker.add_argument("directory", type=Path, metavar="DIR", help="new or empty folder")
    maker.add_argument("--preset", required=True, choices=sorted(PRESETS))
    maker.add_argument("--seed", type=int, default=0)
    maker.add_argument(
        "--outliers",
        action="store_true",
        help="with outlier channels as in trained models, to test quantization",
    )
    maker.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    check_installed("guardengine make-checkpoint", "engine")
    from guardengine.checkpoint.random_weights import make_checkpoint

    directory, preset = arguments.directory, arguments.preset
    make_checkpoint(directory, preset, seed=arguments.seed, outliers=arguments.outliers, progress=True)
    print(f"wrote {preset} to {directory}")
    return 0
