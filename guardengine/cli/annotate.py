"""`guardengine annotate`: the command line of `annotate.run`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from guardengine.cli.options import Commands, add_engine_options, engine_options
from guardengine.errors import ConfigError
from guardengine.extras import check_installed


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `guardengine`."""
    annotator = commands.add_parser(
        "annotate",
        help="annotate a data set with a checkpoint's verdicts",
        description="Judge every row of a data set and write it with the columns guard_risk, guard_category, "
        "guard_scores, guard_first_flag_token and guard_first_flag_char. A run that was killed goes on when the same "
        "command is given again. Rows that cannot be judged stay in OUT with nulls and are listed in OUT.bad.jsonl. "
        "Exits with 0, with 1 when there are more of them than --allow-bad-rows, or with 2.",
    )
    annotator.add_argument(
        "input",
        type=Path,
        metavar="IN",
        help="a .jsonl, .parquet or .arrow file, or a data-set folder (of datasets.save_to_disk, or a hub snapshot)",
    )
    annotator.add_argument("output", type=Path, metavar="OUT", help="a .jsonl or .parquet file")
    annotator.add_argument(
        "--checkpoint", required=True, metavar="CHECKPOINT", help="Stream or Gen: a folder, or a hub id"
    )
    annotator.add_argument("--revision", help="of a hub id")
    columns = annotator.add_argument_group("columns (found by their usual names where none is given)")
    columns.add_argument(
        "--prompt-column", metavar="NAME", help="text of the user; judged itself if named without a response"
    )
    columns.add_argument("--response-column", metavar="NAME", help="text of the assistant: what is judged")
    columns.add_argument(
        "--messages-column", metavar="NAME", help="lists of role and content, of which the last is judged"
    )
    columns.add_argument("--split", metavar="NAME", help="of a data-set folder")
    columns.add_argument(
        "--prefix", default="guard_", metavar="TEXT", help="of the columns added (default: %(default)s)"
    )
    columns.add_argument("--limit", type=int, metavar="N", help="annotate the first N rows only")
    policy = annotator.add_argument_group("policy")
    policy.add_argument(
        "--policy",
        choices=("strict", "loose"),
        default="strict",
        help="whether Controversial counts as unsafe (strict, the default) or safe",
    )
    policy.add_argument(
        "--debounce",
        type=int,
        default=2,
        metavar="N",
        help="tokens in a row that it takes to flag a response (default: %(default)s)",
    )
    annotator.add_argument(
        "--allow-bad-rows", type=int, default=0, metavar="N", help="exit with 0 still (default: %(default)s)"
    )
    annotator.add_argument(
        "--restart", action="store_true", help="begin anew, whatever an earlier run has left or finished"
    )
    running = annotator.add_argument_group("running")
    add_engine_options(running, "backend", "quantization", "num_threads")
    running.add_argument(
        "--batch-rows",
        type=int,
        default=2048,
        metavar="N",
        help="rows that are read, and sorted by length, at a time (default: %(default)s)",
    )
    running.add_argument("--quiet", action="store_true", help="no progress bar")
    cluster = annotator.add_argument_group("on a Ray cluster (docs/serving/ray.md)")
    cluster.add_argument(
        "--ray", action="store_true", help="judge rows there; IN and OUT stay on this machine"
    )
    cluster.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="of the cluster (default: RAY_ADDRESS, or one begun for this)",
    )
    cluster.add_argument(
        "--ray-actors", type=int, metavar="N", help="engines, each with --threads CPUs (default: one a node)"
    )
    cluster.add_argument(
        "--ray-gpus", type=float, default=0, metavar="N", help="GPUs of each engine (default: %(default)s)"
    )
    annotator.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.allow_bad_rows < 0:
        raise ConfigError(f"--allow-bad-rows {arguments.allow_bad_rows}: a number of rows from 0 is needed")
    check_installed("guardengine annotate", "engine")
    from guardengine.annotate.layout import Layout
    from guardengine.annotate.run import Options, annotate

    options = Options(
        layout=Layout(arguments.prompt_column, arguments.response_column, arguments.messages_column),
        split=arguments.split,
        policy=arguments.policy,
        debounce=arguments.debounce,
        prefix=arguments.prefix,
        limit=arguments.limit,
        revision=arguments.revision,
        window_rows=arguments.batch_rows,
        **engine_options(arguments),
    )
    judging = None
    if arguments.ray:
        from guardengine.on_ray.annotating import Actors, judging_on

        actors = Actors(
            address=arguments.ray_address,
            num_actors=arguments.ray_actors,
            num_cpus=arguments.num_threads,
            num_gpus=arguments.ray_gpus,
        )
        judging = judging_on(actors, arguments.checkpoint, options)
    elif arguments.ray_address or arguments.ray_actors or arguments.ray_gpus:
        raise ConfigError("--ray-address, --ray-actors and --ray-gpus are for --ray; give that too")
    try:
        report = annotate(
            arguments.input,
            arguments.output,
            arguments.checkpoint,
            options,
            restart=arguments.restart,
            progress=not arguments.quiet,
            judging=judging,
        )
    except KeyboardInterrupt:
        print("guardengine: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    risks = ", ".join(f"{count} {risk}" for risk, count in sorted(report.risks.items()))
    print(f"{report.layout}: {report.num_rows} rows, {risks or 'none judged'}")
    if report.num_resumed:
        print(f"{report.num_resumed} of them had been judged before")
    if report.num_tokens:
        print(
            f"{report.num_tokens} tokens in {report.seconds:.1f} s, {report.num_tokens / report.seconds:.0f} a second"
        )
    if report.as_text:
        print(f"columns of several types, written as JSON text: {', '.join(report.as_text)}")
    print(f"wrote {arguments.output}")
    if report.num_bad:
        print(
            f"guardengine: {report.num_bad} rows were not judged; {arguments.output}.bad.jsonl says why",
            file=sys.stderr,
        )
    return 1 if report.num_bad > arguments.allow_bad_rows else 0
