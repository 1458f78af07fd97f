"""The `guardengine` command: thin wrappers around the library."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from guardengine._version import __version__
from guardengine.checkpoint.random_weights import PRESETS, make_checkpoint
from guardengine.cli.annotate import add_command as add_annotate
from guardengine.cli.chat import add_command as add_chat
from guardengine.cli.evaluate import add_command as add_evaluate
from guardengine.cli.moderate import add_command as add_moderate
from guardengine.cli.proxy import add_command as add_proxy
from guardengine.cli.ray_serve import add_command as add_ray_serve
from guardengine.cli.serve import add_command as add_serve
from guardengine.errors import ConfigError, GuardEngineError
from guardengine.measuring.files import check_writable, write_json
from guardengine.verify.quantization import SCHEMES, verify_quantization
from guardengine.verify.replay import Report, replay
from guardengine.verify.report import markdown


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
    _add_replay(commands)
    add_evaluate(commands)
    add_annotate(commands)
    add_serve(commands)
    add_proxy(commands)
    add_ray_serve(commands)
    add_moderate(commands)
    add_chat(commands)
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


def _add_replay(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    replayer.add_argument("--threads", type=int, metavar="N", help="default: one a core")
    replayer.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="of logits where bits cannot be compared (default: by dtype)",
    )
    replayer.add_argument(
        "--max-differences", type=int, default=20, metavar="N", help="print so many (default: %(default)s)"
    )
    replayer.set_defaults(run=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    if arguments.tolerance is not None and not arguments.tolerance >= 0:
        raise ConfigError(f"--tolerance {arguments.tolerance}: a number from 0 is needed")
    report = replay(
        arguments.logs,
        arguments.checkpoint,
        backend=arguments.backend,
        revision=arguments.revision,
        num_threads=arguments.threads,
        tolerance=arguments.tolerance,
        max_differences=max(0, arguments.max_differences),
        progress=True,
    )
    _print_replay(report)
    return 1 if report.num_differences else 0


def _print_replay(report: Report) -> None:
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
