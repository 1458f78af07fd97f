"""`guardengine serve`: the command line of `server.run`."""

from __future__ import annotations

import argparse
from typing import Any

Options = tuple[tuple[str, type, str], ...]

# Options of the engine: name, type, what it is.
ENGINE = (
    ("device", str, "auto, cpu, cuda or cuda:N"),
    ("backend", str, "auto, reference, cpu or triton"),
    ("dtype", str, "auto, float32 or bfloat16"),
    ("quantization", str, "int8 or w8a8"),
    ("kv-cache-bytes", int, "of keys and values, in all"),
    ("max-num-streams", int, "open at the same time"),
    ("max-model-len", int, "tokens a stream"),
    ("max-step-ms", float, "what a step should take at most"),
    ("max-pending-tokens", int, "accepted and not computed, of all streams"),
    ("max-streams-per-tenant", int, "of one API key"),
    ("max-pending-tokens-per-tenant", int, "of one API key"),
    ("idle-ttl-s", float, "close streams that were idle for so long"),
    ("num-threads", int, "default: one a core"),
    ("audit-log", str, "write every decision of the Stream checkpoint to this file"),
)
_LIMITS = (
    ("max-body-bytes", int, "of a request"),
    ("max-inputs", int, "of one moderation request"),
    ("max-requests", int, "at a time"),
    ("max-connections", int, "at a time"),
    ("max-streams-per-connection", int, "of one WebSocket"),
    ("header-timeout-s", float, "until a request's headers are there"),
    ("body-timeout-s", float, "until its body is"),
    ("request-timeout-s", float, "until its answer is"),
    ("idle-timeout-s", float, "of WebSockets without streams"),
    ("drain-timeout-s", float, "that streams have to finish after SIGTERM"),
)


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of `guardengine`."""
    server = commands.add_parser(
        "serve",
        help="serve a checkpoint over HTTP and WebSocket",
        description="Serve a Stream checkpoint (moderations, guard, live streams), a Gen checkpoint (chat completions) "
        "or both. SIGTERM lets streams finish; a second one ends at once. The playground is at /, the "
        "API's description at /docs.",
    )
    add_serving(server)
    server.set_defaults(run=_run)


def add_serving(server: argparse.ArgumentParser) -> None:
    """What is served, where, to whom and within what limits: for `settings_of`, `engine_options_of` and the rest."""
    server.add_argument("checkpoint", metavar="CHECKPOINT", help="Stream or Gen: a folder, or a hub id")
    server.add_argument("--revision", help="of a hub id")
    server.add_argument("--gen", metavar="CHECKPOINT", help="a Gen checkpoint beside a Stream checkpoint")
    server.add_argument("--gen-revision", help="of its hub id")
    server.add_argument("--served-model-name", metavar="NAME", help="of the Stream checkpoint in requests")
    server.add_argument("--served-gen-name", metavar="NAME", help="of the Gen checkpoint")
    server.add_argument(
        "--playground-upstream",
        metavar="URL",
        help="an OpenAI-compatible API that the page at / may call, from the browser and with that person's key",
    )
    add_access(server)
    judging = server.add_argument_group("judging, where a request does not say")
    judging.add_argument("--policy", choices=("strict", "loose"), default="strict")
    judging.add_argument("--debounce", type=int, metavar="N", help="tokens in a row that decide")
    judging.add_argument("--taxonomy", choices=("qwen", "openai"), default="qwen", help="of /v1/moderations")
    judging.add_argument(
        "--gen-mode", choices=("greedy", "choice"), default="greedy", help="of chat completions"
    )
    add_options(server.add_argument_group("engine (both checkpoints)"), ENGINE)
    add_options(server.add_argument_group("limits"), _LIMITS)
    add_logs(server)


def add_access(parser: argparse.ArgumentParser) -> None:
    """Where to listen, and who may call."""
    access = parser.add_argument_group("access")
    access.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    access.add_argument("--port", type=int, default=8000, help="0: any (default: %(default)s)")
    access.add_argument("--ssl-certfile", metavar="FILE")
    access.add_argument("--ssl-keyfile", metavar="FILE")
    access.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="keys, one a line as KEY or NAME KEY; more may be in GUARDENGINE_API_KEYS, between commas. Without any, "
        "everybody who reaches the port may call",
    )
    access.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="browsers' pages that may call; *: all",
    )


def add_options(group: argparse._ArgumentGroup, options: Options) -> None:
    """Options that take a number or a word; `given` has those that were given."""
    for name, kind, text in options:
        group.add_argument(f"--{name}", type=kind, metavar="X", help=text)


def add_logs(parser: argparse.ArgumentParser) -> None:
    """What is logged."""
    logs = parser.add_argument_group("log")
    logs.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    logs.add_argument(
        "--log-text", action="store_true", help="users' texts too, which are never logged otherwise"
    )


def _run(arguments: argparse.Namespace) -> int:
    from guardengine.server.requirements import check_installed

    check_installed()
    from guardengine.server.serve import serve

    return serve(
        arguments.checkpoint,
        revision=arguments.revision,
        gen=arguments.gen,
        gen_revision=arguments.gen_revision,
        host=arguments.host,
        port=arguments.port,
        options=engine_options_of(arguments),
        settings=settings_of(arguments),
        log_level=arguments.log_level,
        ssl_certfile=arguments.ssl_certfile,
        ssl_keyfile=arguments.ssl_keyfile,
    )


def settings_of(arguments: argparse.Namespace) -> Any:
    """The ServerSettings. Raises ConfigError."""
    from guardengine.policy import Policy
    from guardengine.server.settings import ServerSettings, read_api_keys

    options: dict[str, Any] = {} if arguments.debounce is None else {"debounce": arguments.debounce}
    names = {"model_name": arguments.served_model_name, "gen_model_name": arguments.served_gen_name}
    return ServerSettings(
        api_keys=read_api_keys(arguments.api_key_file),
        cors_origins=tuple(arguments.cors_origin),
        playground_upstream=arguments.playground_upstream,
        policy=Policy.of(arguments.policy, **options),
        taxonomy=arguments.taxonomy,
        gen_mode=arguments.gen_mode,
        log_text=arguments.log_text,
        **{name: value for name, value in names.items() if value is not None},
        **given(arguments, _LIMITS),
    )


def engine_options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """For `Engine.from_pretrained`."""
    return given(arguments, ENGINE)


def given(arguments: argparse.Namespace, options: Options) -> dict[str, Any]:
    """The options that were given, by their names in Python."""
    names = [name.replace("-", "_") for name, _, _ in options]
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}
