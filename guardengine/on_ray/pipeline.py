"""judged(): rows through engines on all nodes of a cluster, as a Ray Data pipeline.

    read task, on this machine     calls (Rows.calls), each a block
    actors, on any machine         one engine each: a call -> lines of the journal, and the number of tokens
    this process                   entries, in the order in which they come

So the input and the output are files of this machine only. When an actor dies, another one judges its call. No call is
judged again once it is answered, because Ray keeps the answer until it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from guardengine._version import __version__
from guardengine.annotate.annotations import Item, Judged, judge_call
from guardengine.annotate.calls import Rows
from guardengine.annotate.digests import checkpoint_digest
from guardengine.annotate.journal import Fault, of_line, to_line
from guardengine.annotate.response_chars import ResponseChars
from guardengine.annotate.run import Options, load_engine
from guardengine.checkpoint.hub import resolve_checkpoint
from guardengine.errors import CheckpointError, ConfigError
from guardengine.on_ray.annotating import Actors
from guardengine.on_ray.cluster import named

Judges = tuple[str, Options, str, str]  # the arguments of _Judge


def judged(actors: Actors, rows: Rows, judges: Judges) -> Iterator[Judged]:
    """The entries of rows. Raises the errors of actors, and ConfigError when Ray gives up."""
    context = DataContext.get_current().copy()
    # In bytes. So small that every call is a block, which is judged as soon as it is read and recorded once judged.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with DataContext.current(context):
        answers = ray.data.read_datasource(_Calls(rows), num_cpus=0, override_num_blocks=1).map_batches(
            _Judge,
            fn_constructor_args=judges,
            compute=ActorPoolStrategy(size=actors.num_actors),
            num_cpus=actors.num_cpus,
            num_gpus=actors.num_gpus or None,
            batch_size=1,
            batch_format="pyarrow",
        )
        try:
            for batch in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for answer in batch.to_pylist():
                    yield [of_line(line) for line in answer["lines"].splitlines()], answer["num_tokens"]
        except ray.exceptions.RayError as error:
            raise named(str(error), "the cluster has given up on the remaining rows") from error


class _Calls(Datasource):  # type: ignore[misc]
    """The source of the pipeline: each of its rows is a call, as JSON."""

    supports_distributed_reads = False

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self._rows = rows

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        rows = self._rows

        def read() -> Iterator[pa.Table]:
            for call in rows.calls():
                yield pa.table({"call": [_to_text(call)]})

        return [ReadTask(read, BlockMetadata(None, None, None, None))]


class _Judge:
    """An actor with one engine for all of its calls."""

    def __init__(self, checkpoint: str, options: Options, digest: str, version: str) -> None:
        if version != __version__:
            raise ConfigError(
                f"a node of the cluster has guardengine {__version__} and this command has {version}; install the "
                "same release everywhere"
            )
        folder = resolve_checkpoint(checkpoint, options.revision)
        if checkpoint_digest(folder) != digest:
            raise CheckpointError(
                f"{folder} is another checkpoint on node {ray.util.get_node_ip_address()} than on the node that this "
                "command runs on; copy the same files to all nodes"
            )
        num_cpus = int(ray.get_runtime_context().get_assigned_resources()["CPU"])
        self._policy, self._chars = options.make_policy(), ResponseChars(folder)
        self._engine = load_engine(folder, replace(options, num_threads=num_cpus))

    def __call__(self, batch: pa.Table) -> dict[str, list[Any]]:
        answers = [
            judge_call(self._engine, _of_text(text), self._policy, self._chars)
            for text in batch["call"].to_pylist()
        ]
        return {
            "lines": [b"".join(to_line(row, entry) for row, entry in entries) for entries, _ in answers],
            "num_tokens": [num_tokens for _, num_tokens in answers],
        }


def _to_text(call: list[Item]) -> bytes:
    return json.dumps(
        [[row, item.reason if isinstance(item, Fault) else item] for row, item in call]
    ).encode()


def _of_text(text: bytes) -> list[Item]:
    return [(row, Fault(item) if isinstance(item, str) else item) for row, item in json.loads(text)]
