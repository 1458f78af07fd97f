"""`guardengine serve`: the command line of `guardengine.server.serve`."""

from __future__ import annotations

import argparse
from typing import Any

from guardengine.cli.options import (
    Commands,
    add_access,
    add_engine_options,
    add_logs,
    add_options,
    engine_options,
    given,
)
from guardengine.extras import check_installed

_LIMITS = (
    ("max_body_bytes", int, "of a request"),
    ("max_inputs", int, "of one moderation request"),
    ("max_requests", int, "at a time"),
    ("max_connections", int, "at a time"),
    ("max_streams_per_connection", int, "of one WebSocket"),
    ("header_timeout_s", float, "until a request's headers are there"),
    ("body_timeout_s", float, "until its body is"),
    ("request_timeout_s", float, "until its answer is"),
    ("idle_timeout_s", float, "of WebSockets without streams"),
    ("drain_timeout_s", float, "that streams have to finish after SIGTERM"),
)


def add_command(commands: Commands) -> None:
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
    """What is served, where, to whom and within what limits: for `settings_of`, `engine_options` and the rest."""
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
    add_engine_options(server.add_argument_group("engine (both checkpoints)"))
    add_options(server.add_argument_group("limits"), _LIMITS)
    add_logs(server)


def _run(arguments: argparse.Namespace) -> int:
    check_installed("guardengine serve", "server")
    from guardengine.server.serve import serve

    return serve(
        arguments.checkpoint,
        revision=arguments.revision,
        gen=arguments.gen,
        gen_revision=arguments.gen_revision,
        host=arguments.host,
        port=arguments.port,
        options=engine_options(arguments),
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
        **given(arguments, (name for name, _, _ in _LIMITS)),
    )
