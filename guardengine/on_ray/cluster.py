"""connected(): the Ray cluster that a command uses. Ray's errors become guardengine's."""

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
from guardengine.extras import how_to_install

# Environment of a cluster that is started here: no usage reports are sent to Ray's makers, and it listens on the
# loopback interface only. Ray has no argument for the latter, but this switch, meant for other platforms, works on
# all.
_OWN_CLUSTER = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_OWN_ERROR = re.compile(r"\bguardengine\.errors\.(\w+): (.*)$", re.MULTILINE)  # the last line of a traceback


def library(part: Literal["serve", "data"]) -> Any:
    """The module ray, with ray.serve or ray.data. Raises ConfigError when it is not installed."""
    try:
        ray = importlib.import_module("ray")
        importlib.import_module(f"ray.{part}")
    except ImportError as error:
        raise ConfigError(
            f"this needs Ray, which is not installed here ({error}); {how_to_install('ray')}"
        ) from None
    return ray


@contextmanager
def connected(address: str | None, part: Literal["serve", "data"]) -> Iterator[Any]:
    """The module ray, connected to a cluster within the context.

    Args:
        address: The address of a cluster's head as HOST:PORT; or "auto" for a cluster that has a node on this machine.
            None: the cluster to which this process is already connected, that of RAY_ADDRESS, or a new one on this
            machine alone that ends with the context.
        part: The part of Ray that is used.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is None and "ray" not in sys.modules:  # ray reads these variables when it is imported
        for name, value in _OWN_CLUSTER.items():
            os.environ.setdefault(name, value)
    ray = library(part)
    if ray.is_initialized():
        yield ray
        return
    if address is not None and "://" in address:
        raise ConfigError(
            f"{address}: give the address of a cluster of which this machine is a node, as HOST:PORT or auto; run "
            "this on a node, or as a job: ray job submit -- guardengine ..."
        )
    try:
        if address is None:
            ray.init("local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of many types, down to Exception itself
        what = "no cluster could be started here" if address is None else f"no Ray cluster at {address}"
        raise ConfigError(
            f"{what} ({_first_line(error)}); `ray start --head` starts one, `ray status` shows the running one"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def resources(nodes: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The resources of the living nodes of a cluster. nodes: from ray.nodes()."""
    return [node["Resources"] for node in nodes if node["Alive"]]


def check_fits(nodes: list[dict[str, Any]], *requests: tuple[str, str, float]) -> None:
    """Raise ConfigError when no node has what is requested, because Ray would wait forever for such a node. requests:
    option, resource and number of each."""
    for option, name, number in requests:
        most = max((node.get(name, 0) for node in resources(nodes)), default=0)
        if number > most:
            raise ConfigError(
                f"{option} {number:g}: no node of the cluster has so many; give at most {most:g}"
            )


def named(text: str, otherwise: str) -> GuardEngineError:
    """The error of guardengine that caused an error of Ray, in whichever process. Ray keeps only the text of some
    errors, so it is found there. A ConfigError that begins with `otherwise` when there is none."""
    for name, message in reversed(_OWN_ERROR.findall(text)):
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, GuardEngineError) and kind is not errors.Blocked:
            return kind(message)
    last = text.strip().rpartition("\n")[2]
    return ConfigError(f"{otherwise} ({last.strip()})")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
