"""The `guardengine evaluate` command: options in, a report out."""

from __future__ import annotations

import argparse
from pathlib import Path

from guardengine.cli.options import Commands, add_engine_options, engine_options
from guardengine.extras import check_installed


def add_command(commands: Commands) -> None:
    """Add `evaluate` to the command line."""
    parser = commands.add_parser(
        "evaluate",
        help="F1, detection latency and calibration on labelled conversations",
        description="Judge labelled conversations in Qwen3GuardTest's format (JSON lines or Parquet) and report what "
        "the released evaluation scripts do, strict (Controversial counts as unsafe) and loose (it counts as safe), "
        "and ROC curves and calibration. Each conversation runs once, for all rules.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".jsonl, or .parquet")
    parser.add_argument("--checkpoint", required=True, metavar="CHECKPOINT", help="a folder, or a hub id")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument(
        "--target",
        choices=("auto", "prompt", "response"),
        default="auto",
        help="what the labels are about (%(default)s: a conversation's last message)",
    )
    parser.add_argument(
        "--no-thinking",
        action="store_true",
        help="judge what follows the reasoning only; by default the reasoning too, as the script does with --thinking",
    )
    parser.add_argument(
        "--rule",
        choices=("report", "eval-compat", "both"),
        default="both",
        help="of a Stream checkpoint's responses: the technical report's or the script's (%(default)s)",
    )
    parser.add_argument(
        "--allow-bad-rows", type=int, default=0, metavar="N", help="leave out up to N rows (%(default)s)"
    )
    parser.add_argument("--max-rows", type=int, metavar="N", help="the first N rows of each file only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, curves included")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write pictures of them")
    add_engine_options(parser, "device", "backend", "dtype", "quantization", "num_threads")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    check_installed("guardengine evaluate", "engine")
    from guardengine.errors import ConfigError
    from guardengine.evaluate.outcomes import STREAM_RULES
    from guardengine.evaluate.plots import save_plots
    from guardengine.evaluate.predict import Aim
    from guardengine.evaluate.report import markdown
    from guardengine.evaluate.run import evaluate
    from guardengine.measuring.files import check_writable, write_json
    from guardengine.measuring.machine import machine_stamp
    from guardengine.measuring.plots import import_pyplot

    if arguments.json is not None:
        check_writable(arguments.json)
    if arguments.plots is not None:  # now rather than after an hour
        import_pyplot()
        if arguments.plots.exists() and not arguments.plots.is_dir():
            raise ConfigError(f"--plots {arguments.plots} is a file; give a folder")
    report = evaluate(
        arguments.files,
        arguments.checkpoint,
        aim=Aim(arguments.target, thinking=not arguments.no_thinking),
        rules=STREAM_RULES if arguments.rule == "both" else (arguments.rule,),
        allow_bad_rows=arguments.allow_bad_rows,
        max_rows=arguments.max_rows,
        revision=arguments.revision,
        progress=True,
        **engine_options(arguments),
    )
    print(markdown(report))
    if arguments.json is not None:
        write_json({**report.as_json(), "machine": machine_stamp()}, arguments.json)
    if arguments.plots is not None:
        for path in save_plots(report, arguments.plots):
            print(f"wrote {path}")
    return 0
