"""connected(): the Ray cluster that a command works on; Ray's own errors are said by name."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from guardengine import errors
from guardengine.errors import ConfigError, GuardEngineError

# Of a cluster that is begun here: Ray reports nothing about it to its makers, and listens on the loopback interface
# only. Ray has no argument for the latter, but this switch of other platforms' works on all.
_OWN_CLUSTER = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_OWN_ERROR = re.compile(r"\bguardengine\.errors\.(\w+): (.*)$", re.MULTILINE)  # where a traceback ends


def library(part: Literal["serve", "data"]) -> Any:
    """The module ray, with ray.serve or ray.data. Raises ConfigError where it is not installed."""
    try:
        ray = importlib.import_module("ray")
        importlib.import_module(f"ray.{part}")
    except ImportError as error:
        raise ConfigError(
            f"this needs Ray, which is not installed here ({error}); run pip install 'guardengine[ray]'"
        ) from None
    return ray


@contextmanager
def connected(address: str | None, part: Literal["serve", "data"]) -> Iterator[Any]:
    """The module ray, connected to a cluster, within the context.

    address: of a cluster's head as HOST:PORT, or "auto", one that has a node on this machine. None: the one that this
    process is connected to already, that of RAY_ADDRESS, or one of this machine alone that ends with the context.

    Raises ConfigError without Ray, and where there is no such cluster.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is None and "ray" not in sys.modules:  # which reads them as it is imported
        for name, value in _OWN_CLUSTER.items():
            os.environ.setdefault(name, value)
    ray = library(part)
    if ray.is_initialized():
        yield ray
        return
    if address is not None and "://" in address:
        raise ConfigError(
            f"{address}: the address of a cluster that this machine is a node of is needed, as HOST:PORT or auto; run "
            "this on a node, or as a job: ray job submit -- guardengine ..."
        )
    try:
        if address is None:
            ray.init("local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of many types, down to Exception itself
        what = "no cluster could be begun here" if address is None else f"no Ray cluster at {address}"
        raise ConfigError(
            f"{what} ({_first_line(error)}); `ray start --head` begins one, `ray status` shows what is there"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def resources(nodes: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What the living ones of a cluster's nodes have. nodes: as ray.nodes() has them."""
    return [node["Resources"] for node in nodes if node["Alive"]]


def check_fits(nodes: list[dict[str, Any]], *wanted: tuple[str, str, float]) -> None:
    """Raise ConfigError where no node has what is asked of one: Ray would wait for such a node. wanted: the option, the
    resource, how much of it."""
    for option, name, number in wanted:
        most = max((node.get(name, 0) for node in resources(nodes)), default=0)
        if number > most:
            raise ConfigError(
                f"{option} {number:g}: no node of the cluster has so many; the most is {most:g}"
            )


def named(text: str, otherwise: str) -> GuardEngineError:
    """guardengine's error that what Ray says comes from, in whichever process: of some Ray keeps the text alone. A
    ConfigError that begins with `otherwise` where it comes from none."""
    for name, message in reversed(_OWN_ERROR.findall(text)):
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, GuardEngineError) and kind is not errors.Blocked:
            return kind(message)
    last = text.strip().rpartition("\n")[2]
    return ConfigError(f"{otherwise} ({last.strip()})")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
