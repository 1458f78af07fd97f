"""`guardengine verify-quantization`: the command line of `verify.quantization`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from guardengine.cli.options import Commands, add_engine_options, engine_options
from guardengine.errors import ConfigError
from guardengine.extras import check_installed
from guardengine.verify.schemes import SCHEMES


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `guardengine`."""
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
    add_engine_options(verifier, "backend", "num_threads")
    verifier.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    verifier.add_argument(
        "--fail-below",
        type=float,
        metavar="AGREEMENT",
        help="exit with status 1 when a smaller share of a scheme's prompt or response risks (0 to 1) agrees",
    )
    verifier.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    least = arguments.fail_below
    if least is not None and not 0 <= least <= 1:
        raise ConfigError(f"--fail-below {least}: a share from 0 to 1 is needed, such as 0.99")
    check_installed("guardengine verify-quantization", "engine")
    from guardengine.measuring.files import check_writable, write_json
    from guardengine.verify.quantization import verify_quantization
    from guardengine.verify.report import markdown

    if arguments.json is not None:
        check_writable(arguments.json)
    report = verify_quantization(
        arguments.checkpoint,
        schemes=arguments.schemes.split(","),
        file=arguments.input,
        max_tokens=arguments.max_tokens,
        revision=arguments.revision,
        progress=True,
        **engine_options(arguments),
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
