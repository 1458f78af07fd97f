"""`guardengine replay`: the command line of `verify.replay`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from guardengine.cli.options import Commands, add_engine_options, engine_options
from guardengine.errors import ConfigError
from guardengine.extras import check_installed

if TYPE_CHECKING:
    from guardengine.verify.replay import Report


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `guardengine`."""
    replayer = commands.add_parser(
        "replay",
        help="run an audit log's streams again and compare logits and verdicts",
        description="Run every stream of an audit log (Engine.from_pretrained(..., audit_log=...)) through the model "
        "again. On the cpu backend, with the log's instruction set, logits must be the same bits; elsewhere they are "
        "compared within a tolerance. Exits with 0 when all is as recorded, 1 when something differs, 2 when it "
        "cannot be told.",
    )
    replayer.add_argument(
        "logs",
        nargs="+",
        type=Path,
        metavar="LOG",
        help="a log, or the pieces of a rotated one, oldest first",
    )
    replayer.add_argument(
        "--checkpoint", required=True, metavar="CHECKPOINT", help="the folder, or hub id, that wrote the log"
    )
    replayer.add_argument("--revision", help="of a hub id")
    replayer.add_argument("--backend", help="the engine's operators (default: the log's)")
    add_engine_options(replayer, "num_threads")
    replayer.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="of logits where bits cannot be compared (default: by dtype)",
    )
    replayer.add_argument(
        "--max-differences", type=int, default=20, metavar="N", help="print so many (default: %(default)s)"
    )
    replayer.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.tolerance is not None and not arguments.tolerance >= 0:
        raise ConfigError(f"--tolerance {arguments.tolerance}: a number from 0 is needed")
    check_installed("guardengine replay", "engine")
    from guardengine.verify.replay import replay

    report = replay(
        arguments.logs,
        arguments.checkpoint,
        revision=arguments.revision,
        tolerance=arguments.tolerance,
        max_differences=max(0, arguments.max_differences),
        progress=True,
        **engine_options(arguments),
    )
    _print(report)
    return 1 if report.num_differences else 0


def _print(report: Report) -> None:
    for line, stream, position, what, logged, replayed in report.differences:
        at = "" if position is None else f" position {position}"
        print(f"line {line}: {stream!r}{at}: {what}: logged {logged!r}, replayed {replayed!r}")
    if report.num_differences > len(report.differences):
        print(f"... and {report.num_differences - len(report.differences)} more")
    how = "bit for bit" if report.tolerance is None else f"within {report.tolerance:g}"
    print(
        f"{report.num_streams} streams, {report.num_labels - report.num_unchecked} labels compared {how} over "
        f"{report.num_tokens} tokens: {report.num_differences} differences"
    )
    if report.num_unchecked:
        print(f"{report.num_unchecked} labels have no token ids on record: only their verdicts were checked")
    if report.num_cut_lines:
        print(f"{report.num_cut_lines} lines were cut off where their writer stopped")
