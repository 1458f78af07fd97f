"""`guardengine ray-serve`, and `application`, which builds the same from the same options for Ray's own tools."""

from __future__ import annotations

import argparse
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from guardengine.cli.options import Commands, engine_options
from guardengine.cli.serve import add_serving, settings_of
from guardengine.errors import ConfigError
from guardengine.extras import check_installed
from guardengine.on_ray.cluster import check_fits, connected, library, named
from guardengine.on_ray.scale import Scale, read_range

if TYPE_CHECKING:
    from guardengine.on_ray.serving import Served


def add_command(commands: Commands) -> None:
    """Add the command to the parser of `guardengine`."""
    parser = commands.add_parser(
        "ray-serve",
        help="serve a checkpoint on a Ray cluster",
        description="What `guardengine serve` does, by replicas all over a Ray cluster, as Ray Serve runs them: more "
        "of them where engines lag, new ones where one dies. Stays until SIGTERM or SIGINT, which end the application. "
        "See docs/serving/ray.md.",
    )
    _add_options(parser)
    parser.set_defaults(run=_run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_serving(parser)
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="of the cluster (default: RAY_ADDRESS, or one begun for this)",
    )
    cluster.add_argument(
        "--name", default="guardengine", help="of the application in Ray Serve (default: %(default)s)"
    )
    cluster.add_argument(
        "--replicas", default="1", metavar="MIN..MAX", help="how many, or a number (default: %(default)s)"
    )
    cluster.add_argument(
        "--cpus",
        type=int,
        default=1,
        metavar="N",
        help="of each replica, and threads of its engine (default: %(default)s)",
    )
    cluster.add_argument("--gpus", type=float, default=0, metavar="N", help="of each (default: %(default)s)")
    for name, what in (
        ("target_lag_ms", "age of the oldest append that is not answered: above it come more replicas"),
        ("upscale_delay_s", "for so long it must be above"),
        ("downscale_delay_s", "for so long it must be below a quarter, for one fewer"),
    ):
        cluster.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            default=getattr(Scale(), name),
            metavar="X",
            help=f"{what} (default: %(default)g)",
        )


def application(arguments: Mapping[str, str]) -> Any:
    """The application for Ray Serve's config files: import_path guardengine.cli.ray_serve:application, and in args
    `options`: what would follow `guardengine ray-serve`, but for --host, --port, --ray-address and --name, which Ray
    has its own places for. Raises ConfigError.
    """
    if set(arguments) != {"options"} or not isinstance(arguments["options"], str):
        raise ConfigError(
            f"args {sorted(arguments)}: one entry is needed, options: CHECKPOINT --replicas 1..4 ..."
        )
    import shlex

    parser = argparse.ArgumentParser(prog="options", exit_on_error=False)
    _add_options(parser)
    try:
        parsed = parser.parse_args(shlex.split(arguments["options"]))
    except (argparse.ArgumentError, ValueError, SystemExit) as error:
        raise ConfigError(f"options: {arguments['options']!r:.200}: {error}") from None
    from guardengine.on_ray import serving

    return serving.application(_served(parsed), _scale(parsed))


def _run(arguments: argparse.Namespace) -> int:
    scale = _scale(arguments)
    check_installed("guardengine ray-serve", "ray")
    library("serve")
    served = _served(arguments)
    names = ", ".join(
        {"stream": served.settings.model_name, "gen": served.settings.gen_model_name}[kind]
        for kind in served.paths()  # which raises here what is wrong with them, and not on some node later
    )
    with connected(arguments.ray_address, "serve") as ray, _stop_signals() as stopped:
        serve = ray.serve
        check_fits(ray.nodes(), ("--cpus", "CPU", scale.num_cpus), ("--gpus", "GPU", scale.num_gpus))
        is_first = not serve.status().proxies
        port = arguments.port or _free_port(arguments.host)
        if is_first:
            http = {"host": arguments.host, "port": port}
            if arguments.ssl_certfile is not None:
                http |= {"ssl_certfile": arguments.ssl_certfile, "ssl_keyfile": arguments.ssl_keyfile}
            serve.start(http_options=http)
        try:
            _start(serve, served, scale, arguments.name)
            scheme = "http" if arguments.ssl_certfile is None else "https"
            where = (
                f"{scheme}://{arguments.host}:{port}" if is_first else "the address of the cluster's Serve"
            )
            print(f"guardengine serves {names} on {where}, with {arguments.replicas} replicas", flush=True)
            stopped.wait()
        finally:
            print("guardengine: taking it away", file=sys.stderr, flush=True)
            if is_first:
                serve.shutdown()
            else:
                serve.delete(arguments.name)
    return 0


def _start(serve: Any, served: Served, scale: Scale, name: str) -> None:
    """Returns when replicas serve. Raises what the first of them raised, and ConfigError where Ray refuses."""
    from guardengine.on_ray.serving import application

    try:
        serve.run(application(served, scale), name=name, route_prefix="/")
    except Exception as error:  # RuntimeError, and Ray's own
        found = serve.status().applications.get(name)
        texts = [str(error), *([part.message for part in found.deployments.values()] if found else [])]
        raise named("\n".join(texts), "Ray Serve could not start it") from error


def _served(arguments: argparse.Namespace) -> Served:
    from guardengine.on_ray.serving import Served

    return Served(
        checkpoint=arguments.checkpoint,
        revision=arguments.revision,
        gen=arguments.gen,
        gen_revision=arguments.gen_revision,
        options=engine_options(arguments),
        settings=settings_of(arguments),
        log_level=arguments.log_level,
    )


def _scale(arguments: argparse.Namespace) -> Scale:
    least, most = read_range(arguments.replicas)
    return Scale(
        least=least,
        most=most,
        num_cpus=arguments.cpus,
        num_gpus=arguments.gpus,
        target_lag_ms=arguments.target_lag_ms,
        upscale_delay_s=arguments.upscale_delay_s,
        downscale_delay_s=arguments.downscale_delay_s,
    )


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set."""
    stopped = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as found:
        return found.getsockname()[1]  # type: ignore[no-any-return]
