"""GpuRunner's own work, without a GPU: what is copied, captured and replayed when, and what happens when it fails.

The device is a queue that does nothing until somebody waits, so memory that is written too early shows.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fused_reference
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from guardengine import ConfigError, Engine, Label, Policy
from guardengine.checkpoint.files import open_checkpoint
from guardengine.checkpoint.fingerprint import Fingerprint, Numerics
from guardengine.checkpoint.weights import load_weights
from guardengine.config import EngineConfig
from guardengine.core.block_pool import BlockPool
from guardengine.core.engine_core import EngineCore
from guardengine.core.layout import build_batch
from guardengine.core.readout import Readout
from guardengine.core.scheduler import Chunk
from guardengine.core.state import StreamState, Wanted
from guardengine.kernels import SMALL_ROWS, reference
from guardengine.runners.accelerator import InterpretedAccelerator
from guardengine.runners.batch import Batch
from guardengine.runners.gpu_runner import GpuRunner
from guardengine.runners.kv_cache import CacheShape
from guardengine.runners.step_inputs import buckets, places
from guardengine.runners.torch_runner import TorchRunner

BLOCK_SIZE, NUM_BLOCKS, MAX_LEN, MAX_ROWS = 4, 128, 128, 100
BUCKETS = buckets(MAX_ROWS)


class QueueAccelerator(InterpretedAccelerator):
    """Queues copies and replays, and does them when an event is waited for; notes everything in `log`."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.queue: list[Callable[[], None]] = []
        self.graphs: list[QueuedGraph] = []
        self.fails_at: str | None = None
        self.static: dict[int, Tensor] = {}  # what was allocated before the last capture, by address

    def note(self, what: str, about: Any = None) -> None:
        self.log.append((what, about))
        if self.fails_at == what:
            self.fails_at = None
            raise RuntimeError(f"planned failure of {what}")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.note("empty", shape)
        found = torch.empty(shape, dtype=dtype)
        if len(self.graphs) < len(BUCKETS):
            self.static[found.data_ptr()] = found
        return found.fill_(torch.nan) if dtype.is_floating_point else found.fill_(-7)

    def upload(self, source: Tensor, destination: Tensor) -> None:
        self.note("upload", (source.nbytes, destination.untyped_storage().data_ptr()))
        self.queue.append(lambda: destination.copy_(source))

    def download(self, source: Tensor, destination: Tensor) -> None:
        self.note("download", (source.nbytes, source.untyped_storage().data_ptr()))
        now = source if source.untyped_storage().data_ptr() in self.static else source.clone()
        self.queue.append(lambda: destination.copy_(now))

    def capture(self, work: Callable[[], None]) -> QueuedGraph:
        self.note("capture")
        work()  # as a GPU would, to compile
        fused_reference.launches.clear()
        fused_reference.touched.clear()
        work()
        self.graphs.append(QueuedGraph(self, work))
        return self.graphs[-1]

    def join(self) -> None:
        self.note("join")

    def record(self) -> QueuedEvent:
        self.note("record")
        return QueuedEvent(self, len(self.queue))

    def synchronize(self) -> None:
        self.run(len(self.queue))

    @torch.inference_mode()
    def run(self, count: int) -> None:
        for index in range(count):
            work, self.queue[index] = self.queue[index], lambda: None
            work()


class QueuedEvent:
    def __init__(self, accelerator: QueueAccelerator, count: int) -> None:
        self.accelerator, self.count = accelerator, count

    def wait(self) -> None:
        self.accelerator.note("wait")
        self.accelerator.run(self.count)


class QueuedGraph:
    def __init__(self, accelerator: QueueAccelerator, work: Callable[[], None]) -> None:
        self.accelerator, self.work = accelerator, work
        self.launches = dict(fused_reference.launches)
        self.touched = fused_reference.touched & accelerator.static.keys()

    def replay(self) -> None:
        self.accelerator.note("replay", self)
        self.accelerator.queue.append(self.work)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    with open_checkpoint(tiny) as checkpoint:
        return checkpoint.config, load_weights(checkpoint, torch.float32, torch.device("cpu"))


@pytest.fixture
def accelerator() -> QueueAccelerator:
    return QueueAccelerator()


@pytest.fixture
def runner(model: Any, accelerator: QueueAccelerator) -> GpuRunner:
    config, weights = model
    runner = GpuRunner(
        fused_reference, config, weights, CacheShape(NUM_BLOCKS, BLOCK_SIZE, torch.float32), MAX_LEN, MAX_ROWS,
        accelerator,
    )  # fmt: skip
    accelerator.log.clear()
    return runner


@pytest.fixture
def plain(model: Any) -> TorchRunner:
    config, weights = model
    return TorchRunner(reference, config, weights, CacheShape(NUM_BLOCKS, BLOCK_SIZE, torch.float32), MAX_LEN)


def batch_of(
    *lengths: int,
    seed: int = 0,
    first_block: int = 0,
    start: int = 0,
    wanted: Sequence[int] | None = None,
) -> Batch:
    """A batch of one chunk from each of some new streams, every token labelled or those at `wanted`."""
    rng = np.random.default_rng(seed)
    chunks = []
    for index, length in enumerate(lengths):
        blocks = -(-(start + length) // BLOCK_SIZE)
        state = StreamState(f"s{index}", Policy.strict(), [])
        state.block_table = array("i", range(first_block, first_block + blocks))
        state.token_ids.extend(rng.integers(0, 500, start + length).tolist())
        state.num_computed_tokens = start
        positions = range(start, start + length) if wanted is None else wanted
        state.wanted = [Wanted(p, "assistant") for p in positions]
        first_block += blocks
        chunks.append(Chunk(state, start, length))
    return build_batch(chunks, BLOCK_SIZE)[0]


def scores_of(runner: Any, batch: Batch) -> np.ndarray:
    scores = runner.launch(batch).wait()
    return np.asarray(scores.logits)


LENGTHS = [(1,), (3, 2), (8,), (5, 1, 7, 4), (40, 24), (65,), (70, 30)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_numbers_are_those_of_the_reference(
    runner: GpuRunner, plain: TorchRunner, lengths: tuple[int, ...]
) -> None:
    batch = batch_of(*lengths)
    scores = runner.launch(batch).wait()
    expected = scores_of(plain, batch)
    np.testing.assert_allclose(scores.logits, expected, atol=1e-5)
    config = runner.info.config
    np.testing.assert_allclose(
        scores.probs, Readout(config.heads).probabilities(expected), atol=1e-5
    )  # from the device
    used = batch.slot_mapping
    for found, wanted in (
        (runner.kv_cache.values, plain.kv_cache.values),
        (runner.kv_cache.scales, plain.kv_cache.scales),
    ):
        if found is not None:
            flat = found.flatten(2, 3)[:, :, used]
            torch.testing.assert_close(flat, wanted.flatten(2, 3)[:, :, used], atol=1e-5, rtol=1e-4)


def test_padding_is_not_stored(runner: GpuRunner) -> None:
    """A step of 3 rows runs in the graph of 4: the cache keeps its NaN everywhere else."""
    batch = batch_of(3, first_block=5)
    scores_of(runner, batch)
    stored = ~runner.kv_cache.values.isnan().flatten(2, 3).flatten(3).any(-1).flatten(0, 1).any(0)
    assert stored.nonzero().flatten().tolist() == batch.slot_mapping.tolist()


@pytest.mark.parametrize("lengths", [(1,), (3,), (5, 1, 7, 4), (64,), (65,), (70, 30)], ids=str)
def test_a_step_is_one_upload_one_replay_one_download(
    runner: GpuRunner, accelerator: QueueAccelerator, lengths: tuple[int, ...]
) -> None:
    runner.launch(batch_of(*lengths))
    assert [what for what, _ in accelerator.log] == ["upload", "replay", "download", "record"]
    rows = sum(lengths)
    graph = accelerator.log[1][1]
    assert graph is accelerator.graphs[BUCKETS[::-1].index(min(b for b in BUCKETS if b >= rows))]
    # Only on the buffers that it was captured with.
    assert accelerator.log[0][1][1] in graph.touched
    assert accelerator.log[2][1][1] in graph.touched


def test_an_upload_is_as_long_as_the_step_needs(runner: GpuRunner, accelerator: QueueAccelerator) -> None:
    def uploaded(batch: Batch) -> int:
        accelerator.log.clear()
        runner.launch(batch).wait()
        return int(accelerator.log[0][1][0])

    # The plan: two numbers, where rows begin, blocks.
    assert uploaded(batch_of(1)) == 4 * (places(1)[-1] + 2 + 2 + 1)
    assert uploaded(batch_of(1, start=20)) == 4 * (places(1)[-1] + 2 + 2 + 6)
    assert uploaded(batch_of(70)) == 4 * (places(80)[-1] + 2 + 2 + 18)


def test_where_no_label_is_wanted_nothing_comes_back(
    runner: GpuRunner, accelerator: QueueAccelerator
) -> None:
    for length in (3, 70):
        accelerator.log.clear()
        scores = runner.launch(batch_of(length, wanted=[])).wait()
        assert scores.logits.shape == (0, sum(runner._steps._buffers.sizes))
        assert "download" not in [what for what, _ in accelerator.log]


@pytest.mark.parametrize("length", [9, 70], ids=["small", "large"])
def test_only_wanted_rows_are_scored(runner: GpuRunner, plain: TorchRunner, length: int) -> None:
    batch = batch_of(length, wanted=[3, length - 1])
    scores = runner.launch(batch).wait()
    np.testing.assert_allclose(scores.logits, scores_of(plain, batch), atol=1e-5)
    assert len(scores.logits) == 2
    assert runner._steps.scores[2:].isnan().all()


class CountAllocations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in ("empty", "zeros", "ones", "full", "clone", "cat")):
            self.made.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_allocates_nothing(runner: GpuRunner) -> None:
    scores_of(runner, batch_of(5))
    batch = batch_of(7, first_block=9)
    with CountAllocations() as counted:
        launched = runner.launch(batch)
    assert counted.made == []
    launched.wait()


def test_launches_of_a_captured_step(runner: GpuRunner, accelerator: QueueAccelerator) -> None:
    layers = runner.info.config.num_layers
    assert len(accelerator.graphs) == len(BUCKETS)
    for rows, graph in zip(BUCKETS[::-1], accelerator.graphs, strict=True):
        outside = graph.launches.pop("guard_scores") + 1  # and the embedding's rows, which torch gathers
        assert outside <= 4
        if rows <= SMALL_ROWS:
            assert sum(graph.launches.values()) <= 6 * layers
            assert set(graph.launches) == {
                "norm_linear", "qk_norm_rope_store_kv", "planned_attention", "linear_add", "norm_gate_up",
            }  # fmt: skip
        else:
            assert sum(graph.launches.values()) == 9 * layers


def test_two_steps_in_flight_keep_apart(
    runner: GpuRunner, plain: TorchRunner, accelerator: QueueAccelerator
) -> None:
    """The device does nothing before the first wait; by then the second step's words have been written."""
    assert runner.max_in_flight == 2
    batches = [batch_of(3, 1, seed=seed, first_block=20 * seed) for seed in range(5)]
    expected = [scores_of(plain, batch) for batch in batches]
    flying = [runner.launch(batches[0])]
    for batch, wanted in zip(batches[1:], expected, strict=False):
        num_waits = [what for what, _ in accelerator.log].count("wait")
        flying.append(runner.launch(batch))
        assert [what for what, _ in accelerator.log].count("wait") == num_waits
        np.testing.assert_allclose(flying.pop(0).wait().logits, wanted, atol=1e-5)
    np.testing.assert_allclose(flying.pop().wait().logits, expected[-1], atol=1e-5)


def test_scores_outlive_their_memory(runner: GpuRunner, plain: TorchRunner) -> None:
    """More steps than there is room for, waited for in any order and more than once."""
    batches = [batch_of(2, 2, seed=seed, first_block=8 * seed) for seed in range(6)]
    expected = [scores_of(plain, batch) for batch in batches]
    launched = [runner.launch(batch) for batch in batches]
    for index in (5, 0, 3, 3, 1, 4, 2):
        np.testing.assert_allclose(launched[index].wait().logits, expected[index], atol=1e-5)


def test_large_and_small_steps_take_turns(runner: GpuRunner, plain: TorchRunner) -> None:
    for seed, lengths in enumerate([(70, 9), (3,), (100, 2), (1, 1), (64,), (66,)]):
        batch = batch_of(*lengths, seed=seed)
        np.testing.assert_allclose(scores_of(runner, batch), scores_of(plain, batch), atol=1e-5)


@pytest.mark.parametrize("what", ["upload", "replay", "download", "record"])
@pytest.mark.parametrize("length", [5, 70], ids=["small", "large"])
@pytest.mark.parametrize("is_second", [False, True], ids=["alone", "with one in flight"])
def test_a_failed_launch_raises_and_poisons_nothing(
    runner: GpuRunner,
    plain: TorchRunner,
    accelerator: QueueAccelerator,
    what: str,
    length: int,
    is_second: bool,
) -> None:
    first, other = batch_of(3, seed=1), batch_of(length, seed=2, first_block=40)
    expected = [scores_of(plain, batch) for batch in (first, other)]
    before = runner.launch(first) if is_second else None
    accelerator.fails_at = what
    with pytest.raises(RuntimeError, match=f"planned failure of {what}"):
        runner.launch(other)
    if before is not None:
        np.testing.assert_allclose(before.wait().logits, expected[0], atol=1e-5)
    for _ in range(3):
        np.testing.assert_allclose(scores_of(runner, other), expected[1], atol=1e-5)
        np.testing.assert_allclose(scores_of(runner, first), expected[0], atol=1e-5)


def test_what_goes_wrong_on_the_device_is_raised_by_its_own_wait(
    runner: GpuRunner, plain: TorchRunner, accelerator: QueueAccelerator
) -> None:
    first, second = (
        runner.launch(batch) for batch in (batch_of(2, seed=1), batch_of(2, seed=2, first_block=9))
    )
    accelerator.fails_at = "wait"
    for _ in range(2):
        with pytest.raises(RuntimeError, match="planned failure of wait"):
            first.wait()
    np.testing.assert_allclose(
        second.wait().logits, scores_of(plain, batch_of(2, seed=2, first_block=9)), atol=1e-5
    )
    # Also where another step needs the memory before anybody has waited.
    failed = runner.launch(batch_of(2, seed=1))
    accelerator.fails_at = "wait"
    later = [runner.launch(batch_of(2, seed=1)) for _ in range(2)]
    with pytest.raises(RuntimeError, match="planned failure of wait"):
        failed.wait()
    for launched in later:
        np.testing.assert_allclose(launched.wait().logits, scores_of(plain, batch_of(2, seed=1)), atol=1e-5)


def test_a_step_that_cannot_be_captured_is_refused_at_the_start(
    model: Any, accelerator: QueueAccelerator
) -> None:
    config, weights = model
    accelerator.fails_at = "capture"
    cache = CacheShape(NUM_BLOCKS, BLOCK_SIZE, torch.float32)
    with pytest.raises(ConfigError, match=r"112 rows could not be captured.*planned failure.*nvidia-smi"):
        GpuRunner(fused_reference, config, weights, cache, MAX_LEN, MAX_ROWS, accelerator)


def test_nothing_begins_before_the_weights_are_there(model: Any, accelerator: QueueAccelerator) -> None:
    config, weights = model
    GpuRunner(
        fused_reference, config, weights, CacheShape(NUM_BLOCKS, BLOCK_SIZE, torch.float32), MAX_LEN, MAX_ROWS,
        accelerator,
    )  # fmt: skip
    assert accelerator.log[0] == ("join", None)


def test_blocks_are_copied_in_every_layer(runner: GpuRunner) -> None:
    scores_of(runner, batch_of(4, first_block=2))
    runner.copy_block(2, 7)
    assert torch.equal(runner.kv_cache.values[:, :, 7], runner.kv_cache.values[:, :, 2])
    assert runner.kv_cache.values[:, :, 8].isnan().all()


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8], ids=str)
def test_engine_on_it(model: Any, kv_dtype: torch.dtype) -> None:
    """Streams of all sizes, forked, rolled back, closed: label for label as on the reference runner."""
    config, weights = model

    def labels(make: Callable[[CacheShape], Any]) -> list[Label]:
        cache = CacheShape(NUM_BLOCKS, BLOCK_SIZE, kv_dtype)
        with Engine(engine_core(make(cache), config), None, config.heads) as engine:
            found = scenario(engine)
            engine.check_integrity()
        return found

    gpu = labels(
        lambda cache: GpuRunner(
            fused_reference, config, weights, cache, MAX_LEN, MAX_ROWS, QueueAccelerator()
        )
    )
    expected = labels(lambda cache: TorchRunner(reference, config, weights, cache, MAX_LEN))
    assert len(gpu) == len(expected) > 80
    for label, wanted in zip(gpu, expected, strict=True):
        assert (label.stream_id, label.position, label.role) == (
            wanted.stream_id, wanted.position, wanted.role,
        )  # fmt: skip
        np.testing.assert_allclose(label.risk_logits, wanted.risk_logits, atol=1e-4)
        assert label.risk_probs == pytest.approx(wanted.risk_probs, abs=1e-4)


def engine_core(runner: Any, config: Any) -> EngineCore:
    options = EngineConfig(max_num_streams=16, max_num_batched_tokens=100)
    fingerprint = Fingerprint([], Numerics("float32", None, "float32"))
    pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
    return EngineCore(config, runner, Readout(config.heads), pool, options, MAX_LEN, fingerprint)


def scenario(engine: Engine) -> list[Label]:
    rng = np.random.default_rng(3)

    def ids(count: int) -> list[int]:
        return rng.integers(0, 500, count).tolist()

    streams = [engine.open(token_ids=ids(length), role="assistant") for length in (70, 3, 1, 20)]
    found = engine.run()
    fork = streams[0].fork()
    for stream in (*streams, fork):
        stream.append(ids(2))
    found += engine.run()
    streams[1].rollback(3)
    streams[2].close()
    for stream in (streams[0], streams[1], fork):
        stream.append(ids(1))
        found += engine.run()
    return found


def test_close_frees_and_ends(runner: GpuRunner, accelerator: QueueAccelerator) -> None:
    launched = runner.launch(batch_of(2))
    runner.close()
    assert launched.wait().logits.shape[0] == 2  # was under way, and is kept
    with contextlib.suppress(AttributeError):
        runner.launch(batch_of(1))
        pytest.fail("a closed runner ran")
    assert not hasattr(runner, "kv_cache")
