"""`guardengine proxy`: the command line of `proxy.serve`."""

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

_TIMES = (
    ("prompt_timeout_s", float, "until the prompt's label is there"),
    ("append_timeout_s", float, "until the labels of a piece of the reply are"),
    ("connect_timeout_s", float, "until the upstream takes a connection"),
    ("upstream_timeout_s", float, "of the upstream's silence"),
)
_SIZES = (
    ("max_choices", int, "n of a request"),
    ("max_event_bytes", int, "of one event of the upstream's"),
    ("max_reply_bytes", int, "of one reply that is not streamed"),
)
_LIMITS = (
    ("max_body_bytes", int, "of a request"),
    ("max_requests", int, "at a time"),
    ("max_connections", int, "at a time"),
    ("header_timeout_s", float, "until a request's headers are there"),
    ("body_timeout_s", float, "until its body is"),
    ("request_timeout_s", float, "until the end of its answer (default: 600)"),
    ("drain_timeout_s", float, "that replies have to finish after SIGTERM"),
)
MAX_STEP_MS = 50.0  # readers wait for a step, which may have others' prompts
_FAILURES = (
    ("on-error", "text that could not be judged because the guard failed"),
    ("on-timeout", "text that was not judged in time"),
    ("on-overload", "text that was not judged for lack of room"),
)


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `guardengine`."""
    parser = commands.add_parser(
        "proxy",
        help="moderate an LLM server's chat completions: a reverse proxy",
        description="Stand before an OpenAI-compatible server (vLLM, SGLang, llama.cpp, transformers serve, OpenAI): "
        "judge every prompt while it is at work on it, and every token of its replies before they are shown. SIGTERM "
        "lets replies finish; a second one ends at once. See docs/serving/proxy.md.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="Stream: a folder, or a hub id")
    parser.add_argument("--revision", help="of a hub id")
    upstream = parser.add_argument_group("the LLM's server")
    upstream.add_argument(
        "--upstream", required=True, metavar="URL", help="its address, such as http://localhost:8001"
    )
    upstream.add_argument(
        "--upstream-key-file", metavar="FILE", help="with its API key; or GUARDENGINE_UPSTREAM_KEY has it"
    )
    upstream.add_argument(
        "--forward-authorization",
        action="store_true",
        help="pass the clients' own Authorization on instead",
    )
    upstream.add_argument(
        "--pass-header",
        action="append",
        default=[],
        metavar="NAME",
        help="a further header of clients that goes to it",
    )
    upstream.add_argument(
        "--pass-unread",
        action="append",
        default=[],
        metavar="NAME",
        help="a request field, or type of content part (image_url), that goes to it unread by the guard",
    )
    add_access(parser)
    judging = parser.add_argument_group("judging")
    judging.add_argument("--policy", choices=("strict", "loose"), default="strict")
    judging.add_argument("--debounce", type=int, metavar="N", help="tokens in a row that decide")
    judging.add_argument("--hold-back", type=int, metavar="N", help="tokens that the reader lags behind")
    for name, text in _FAILURES:
        judging.add_argument(f"--{name}", choices=("block", "open"), default="block", help=text)
    styles = ("filter", "refuse", "error")
    judging.add_argument(
        "--on-block",
        choices=styles,
        default="filter",
        help="a reply's end: finish_reason content_filter, the refusal, or an error (default: %(default)s)",
    )
    judging.add_argument(
        "--on-blocked-prompt",
        choices=styles,
        default="error",
        help="the same where the prompt is blocked; error: HTTP 400 (default: %(default)s)",
    )
    judging.add_argument("--refusal", metavar="TEXT", help="what to say instead")
    add_engine_options(parser.add_argument_group("engine"), defaults={"max_step_ms": MAX_STEP_MS})
    add_options(parser.add_argument_group("limits"), _TIMES + _SIZES + _LIMITS)
    add_logs(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    check_installed("guardengine proxy", "proxy")
    from guardengine.proxy.serve import serve_proxy

    return serve_proxy(
        arguments.checkpoint,
        _settings(arguments),
        revision=arguments.revision,
        host=arguments.host,
        port=arguments.port,
        options=engine_options(arguments),
        log_level=arguments.log_level,
        ssl_certfile=arguments.ssl_certfile,
        ssl_keyfile=arguments.ssl_keyfile,
    )


def _settings(arguments: argparse.Namespace) -> Any:
    from guardengine.cli.upstream_key import read_upstream_key
    from guardengine.policy import Policy
    from guardengine.proxy.settings import PASS_HEADERS, ProxySettings
    from guardengine.server.settings import ServerSettings, read_api_keys

    options: dict[str, Any] = {
        name: value for name in ("debounce", "hold_back") if (value := getattr(arguments, name)) is not None
    }
    for name, _ in _FAILURES:
        option = name.replace("-", "_")
        options[option] = "open" if getattr(arguments, option) == "open" else "closed"
    server = ServerSettings(
        api_keys=read_api_keys(arguments.api_key_file),
        cors_origins=tuple(arguments.cors_origin),
        policy=Policy.of(arguments.policy, **options),
        log_text=arguments.log_text,
        **{"request_timeout_s": 600.0, **given(arguments, (name for name, _, _ in _LIMITS))},
    )
    more = {} if arguments.refusal is None else {"refusal": arguments.refusal}
    return ProxySettings(
        upstream=arguments.upstream,
        upstream_key=read_upstream_key(arguments.upstream_key_file),
        server=server,
        on_block=arguments.on_block,
        on_blocked_prompt=arguments.on_blocked_prompt,
        forward_authorization=arguments.forward_authorization,
        pass_headers=(*PASS_HEADERS, *(name.lower() for name in arguments.pass_header)),
        pass_unread=tuple(arguments.pass_unread),
        **more,
        **given(arguments, (name for name, _, _ in _TIMES + _SIZES)),
    )
