"""judging_on(): rows judged by engines all over a cluster, for `annotate`. Imports Ray when it is called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guardengine._version import __version__
from guardengine.annotate.calls import Rows
from guardengine.annotate.judging import Judged
from guardengine.annotate.run import Judging, Options
from guardengine.errors import ConfigError
from guardengine.on_ray.cluster import check_fits, connected, resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Actors:
    """How many engines, and what each takes of its node. None: one a node, which has the node's CPUs.

    num_cpus are the engine's threads too. address: of the cluster, see `connected`.
    """

    address: str | None = None
    num_actors: int | None = None
    num_cpus: int | None = None
    num_gpus: float = 0

    def __post_init__(self) -> None:
        for option, value in (("--ray-actors", self.num_actors), ("--threads", self.num_cpus)):
            if value is not None and value < 1:
                raise ConfigError(f"{option} {value}: a number from 1 is needed")
        if not 0 <= self.num_gpus < math.inf:
            raise ConfigError(f"--ray-gpus {self.num_gpus}: a number from 0 is needed")

    def fitted(self, nodes: list[dict[str, Any]]) -> Actors:
        """With numbers for what is None. nodes: as ray.nodes() has them. Raises ConfigError for what no node has."""
        cpus = [int(node["CPU"]) for node in resources(nodes) if node.get("CPU", 0) >= 1] or [0]
        num_actors = self.num_actors or len(cpus)
        num_cpus = self.num_cpus or max(1, min(cpus) // math.ceil(num_actors / len(cpus)))
        check_fits(nodes, ("--threads", "CPU", num_cpus), ("--ray-gpus", "GPU", self.num_gpus))
        return replace(self, num_actors=num_actors, num_cpus=num_cpus)


def judging_on(actors: Actors, checkpoint: str, options: Options) -> Judging:
    """checkpoint, options: those that `annotate` is given. Every node looks for the checkpoint by itself."""

    @contextmanager
    def judging(rows: Rows, folder: Path, digest: str) -> Iterator[Iterable[Judged]]:
        with connected(actors.address, "data") as ray:
            from guardengine.on_ray.pipeline import judged

            fitted = actors.fitted(ray.nodes())
            # A folder from the root, as actors work elsewhere; a hub id as it is.
            name = str(folder.absolute()) if Path(checkpoint).expanduser().is_dir() else checkpoint
            yield judged(fitted, rows, (name, options, digest, __version__))

    return judging
