"""The `guardengine` command: thin wrappers around the library."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from guardengine._version import __version__
from guardengine.bench.report import check_writable, write_json
from guardengine.errors import ConfigError, GuardEngineError
from guardengine.make_checkpoint import PRESETS, make_checkpoint
from guardengine.verify_quantization import SCHEMES, verify_quantization
from guardengine.verify_report import markdown


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 where a check has failed, or 2 with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="guardengine",
        description="Streaming safety moderation with Qwen3Guard. The benchmark is `python -m guardengine.bench`.",
    )
    parser.add_argument("--version", action="version", version=f"guardengine {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_make_checkpoint(commands)
    _add_verify_quantization(commands)
    arguments = parser.parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return command(arguments)
    except GuardEngineError as error:
        print(f"guardengine: {error}", file=sys.stderr)
        return 2


def _add_make_checkpoint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    maker.set_defaults(run=_make_checkpoint)


def _make_checkpoint(arguments: argparse.Namespace) -> int:
    directory, preset = arguments.directory, arguments.preset
    make_checkpoint(directory, preset, seed=arguments.seed, outliers=arguments.outliers, progress=True)
    print(f"wrote {preset} to {directory}")
    return 0


def _add_verify_quantization(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verifier = commands.add_parser(
        "verify-quantization",
        help="compare a checkpoint's labels under quantization with those in float32",
        description="Run conversations through a checkpoint in float32, in its own dtype and under quantization "
        "schemes, and report how logits, labels and verdicts differ. Needs memory for the float32 weights.",
    )
    verifier.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, or a hub id")
    verifier.add_argument("--revision", help="of a hub id")
    verifier.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help='JSON lines with "messages", or a user\'s prompt a line; default: conversations that come with '
        "guardengine, or random token ids where the checkpoint has no tokenizer",
    )
    verifier.add_argument(
        "--schemes", default=",".join(SCHEMES), metavar="NAME,NAME,...", help="(default: %(default)s)"
    )
    verifier.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="leave out conversations that take the total past N tokens",
    )
    verifier.add_argument("--backend", default="auto", help="the engine's operators (%(default)s)")
    verifier.add_argument("--threads", type=int, metavar="N", help="default: one a core")
    verifier.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    verifier.add_argument(
        "--fail-below",
        type=float,
        metavar="AGREEMENT",
        help="exit with status 1 when a smaller share of a scheme's prompt or response risks (0 to 1) agrees",
    )
    verifier.set_defaults(run=_verify_quantization)


def _verify_quantization(arguments: argparse.Namespace) -> int:
    least = arguments.fail_below
    if least is not None and not 0 <= least <= 1:
        raise ConfigError(f"--fail-below {least}: a share from 0 to 1 is needed, such as 0.99")
    if arguments.json is not None:
        check_writable(arguments.json)
    report = verify_quantization(
        arguments.checkpoint,
        schemes=arguments.schemes.split(","),
        file=arguments.input,
        max_tokens=arguments.max_tokens,
        backend=arguments.backend,
        revision=arguments.revision,
        num_threads=arguments.threads,
        progress=True,
    )
    print(markdown(report))
    if arguments.json is not None:
        write_json(report.as_json(), arguments.json)
    if least is not None and report.risk_agreement < least:
        print(
            f"guardengine: {report.risk_agreement:.2%} of the risk labels agree under the worst scheme, fewer than "
            f"--fail-below {least:.2%}; serve this checkpoint without that scheme",
            file=sys.stderr,
        )
        return 1
    return 0
