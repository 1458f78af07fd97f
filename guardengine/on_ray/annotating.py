"""judging_on(): let engines on the nodes of a cluster judge rows for `annotate`. Imports Ray when it is called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guardengine._version import __version__
from guardengine.annotate.annotations import Judged
from guardengine.annotate.calls import Rows
from guardengine.annotate.run import Judging, Options
from guardengine.errors import ConfigError
from guardengine.on_ray.cluster import check_fits, connected, resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Actors:
    """The engines on a cluster.

    Attributes:
        address: The address of the cluster, see `connected`.
        num_actors: Number of engines. None: one for each node.
        num_cpus: CPUs, and threads, of each engine. None: the CPUs of a node, shared by its engines.
        num_gpus: GPUs of each engine.
    """

    address: str | None = None
    num_actors: int | None = None
    num_cpus: int | None = None
    num_gpus: float = 0

    def __post_init__(self) -> None:
        for option, value in (("--ray-actors", self.num_actors), ("--threads", self.num_cpus)):
            if value is not None and value < 1:
                raise ConfigError(f"{option} {value}: give a number from 1")
        if not 0 <= self.num_gpus < math.inf:
            raise ConfigError(f"--ray-gpus {self.num_gpus}: give a number from 0")

    def fitted(self, nodes: list[dict[str, Any]]) -> Actors:
        """These options with numbers in place of None. nodes: from ray.nodes(). Raises ConfigError for more than any
        node has."""
        cpus = [int(node["CPU"]) for node in resources(nodes) if node.get("CPU", 0) >= 1] or [0]
        num_actors = self.num_actors or len(cpus)
        num_cpus = self.num_cpus or max(1, min(cpus) // math.ceil(num_actors / len(cpus)))
        check_fits(nodes, ("--threads", "CPU", num_cpus), ("--ray-gpus", "GPU", self.num_gpus))
        return replace(self, num_actors=num_actors, num_cpus=num_cpus)


def judging_on(actors: Actors, checkpoint: str, options: Options) -> Judging:
    """The `judging` of `annotate` on a cluster.

    Args:
        actors: The engines.
        checkpoint: The checkpoint of `annotate`. Each node looks for it on its own disk or on the hub.
        options: The options of `annotate`.
    """

    @contextmanager
    def judging(rows: Rows, folder: Path, digest: str) -> Iterator[Iterable[Judged]]:
        with connected(actors.address, "data") as ray:
            from guardengine.on_ray.pipeline import judged

            fitted = actors.fitted(ray.nodes())
            # A folder as an absolute path, because actors have other working folders; a hub id unchanged.
            name = str(folder.absolute()) if Path(checkpoint).expanduser().is_dir() else checkpoint
            yield judged(fitted, rows, (name, options, digest, __version__))

    return judging
