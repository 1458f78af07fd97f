"""GpuRunner: owns the weights and the KV cache on a GPU and runs batches there. Knows no streams.

A step replays a captured graph (captured_steps.py): one copy to the device, its kernels, and one copy back. Nothing
waits on the way: `launch` returns when all is queued, so the host can prepare the next step meanwhile.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from guardengine.checkpoint.model_config import ModelConfig
from guardengine.checkpoint.weights import Weights
from guardengine.errors import CheckpointError
from guardengine.runners.accelerator import Accelerator, Event
from guardengine.runners.batch import Batch
from guardengine.runners.captured_steps import CapturedSteps
from guardengine.runners.kv_cache import CacheShape, KVCache
from guardengine.runners.lm_head import LmHead
from guardengine.runners.model import FusedModel
from guardengine.runners.operators import FusedOperators
from guardengine.runners.runner import RunnerInfo, Scores
from guardengine.runners.step_inputs import Words, places, write_step

_MIN_HOST_WORDS = 4096


class GpuRunner:
    """Executes the model over a paged KV cache on one queue of a device.

    A label's numbers are the same bits whatever else runs in its step, for steps of up to 64 rows.

    Args:
        ops: The backend's operators.
        config: The model's sizes.
        weights: Of a Stream checkpoint, on the accelerator's device.
        cache: Size and dtype of the KV cache to allocate there.
        max_model_len: Tokens of a stream at most.
        max_rows: Rows of a step at most.
        accelerator: The device.

    Raises:
        CheckpointError: The checkpoint has no guard heads.
        ConfigError: A step cannot be captured.
    """

    max_in_flight = 2

    def __init__(
        self,
        ops: FusedOperators,
        config: ModelConfig,
        weights: Weights,
        cache: CacheShape,
        max_model_len: int,
        max_rows: int,
        accelerator: Accelerator,
    ) -> None:
        if weights.heads is None or config.heads is None:
            raise CheckpointError("the checkpoint has no guard heads; use a Qwen3Guard-Stream checkpoint")
        self.lm_head: LmHead | None = None  # it runs Stream checkpoints
        self.info = RunnerInfo(
            backend="triton",
            config=config,
            device=accelerator.device,
            dtype=weights.embed.dtype,
            quantization=None,
            isa=accelerator.name,
            num_threads=1,
        )
        self._accelerator = accelerator
        self._num_logits = config.heads.num_logits
        self._slots = (_HostSlot(accelerator), _HostSlot(accelerator))
        self._next = 0
        accelerator.join()  # the weights were copied on another queue
        with torch.inference_mode(), accelerator.activate():
            self.kv_cache = KVCache.layers_first(cache, config, accelerator.empty)
            cos_sin = ops.rope_table(config.head_dim, config.rope_theta, max_model_len).to(accelerator.device)
            model = FusedModel(ops, config, weights, cos_sin, self.kv_cache)
            # A stream is never longer than the cache, whatever the model takes.
            max_length = min(max_model_len, cache.num_blocks * cache.block_size)
            self._steps = CapturedSteps(model, accelerator, max_rows, max_length)

    def launch(self, batch: Batch) -> LaunchedStep:
        """Queue one batch and return without waiting. When this raises, nothing counts as computed: what was queued
        already wrote only where the same batch will write again."""
        slot = self._slots[self._next]
        slot.settle()  # the step before the last: its scores leave the memory that this one gets
        try:
            with torch.inference_mode(), self._accelerator.activate():
                scores = self._queue(slot, batch)
                host = slot.download(scores[: len(batch.label_index)])
                step = LaunchedStep(self._accelerator.record(), host, self._num_logits)
        except BaseException:
            # Copies may be under way from memory that the next step would write to.
            with contextlib.suppress(Exception):
                self._accelerator.synchronize()
            raise
        slot.step = step
        self._next = 1 - self._next
        return step

    @torch.inference_mode()
    def copy_block(self, source: int, destination: int) -> None:
        """Copy one block's keys and values in every layer, after the steps that were launched before."""
        with self._accelerator.activate():
            self.kv_cache.copy_block(source, destination)

    def close(self) -> None:
        """Free the weights, the KV cache and the graphs; nothing can run afterwards."""
        with contextlib.suppress(Exception):  # of a device that failed: memory goes all the same
            self._accelerator.synchronize()
        for slot in self._slots:
            slot.settle()
        del self.kv_cache, self._steps, self._slots
        with contextlib.suppress(Exception):
            self._accelerator.close()

    def _queue(self, slot: _HostSlot, batch: Batch) -> Tensor:
        steps = self._steps
        num_rows, plan = steps.bucket(len(batch.input_ids)), steps.plan(batch)
        words = slot.words_for(places(num_rows)[-1] + len(plan))
        used = write_step(words, num_rows, batch, plan)
        self._accelerator.upload(slot.words[:used], steps.words[:used])
        return steps.replay(num_rows)


class LaunchedStep:
    """A step that is queued. Its scores are copied out of the shared host memory once."""

    def __init__(self, event: Event, scores: Tensor, num_logits: int) -> None:
        self._event, self._host, self._num_logits = event, scores, num_logits
        self._scores: Scores | None = None
        self._error: Exception | None = None

    def wait(self) -> Scores:
        """The scores, once the device is done. Raises what went wrong there, every time."""
        self.settle()
        if self._scores is None:
            raise self._error or RuntimeError("the step has no result")
        return self._scores

    def settle(self) -> None:
        """Wait and keep what came of it; raises nothing."""
        if self._scores is not None or self._error is not None:
            return
        try:
            self._event.wait()
        except Exception as error:
            self._error = error
        else:
            numbers, count = self._host.numpy().copy(), self._num_logits
            self._scores = Scores(numbers[:, :count], numbers[:, count : 2 * count])


class _HostSlot:
    """The host's memory of one step in flight: its words, its scores. Grows to the largest step so far."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.words = accelerator.host_buffer((_MIN_HOST_WORDS,), torch.int32)
        self.scores = accelerator.host_buffer((_MIN_HOST_WORDS,), torch.float32)
        self.step: LaunchedStep | None = None

    def settle(self) -> None:
        """Wait for the step whose memory this is, if it is still in flight."""
        if self.step is not None:
            self.step.settle()
            self.step = None

    def words_for(self, count: int) -> Words:
        if self.words.numel() < count:
            self.words = self._accelerator.host_buffer((2 * count,), torch.int32)
        words: Words = self.words.numpy()
        return words

    def download(self, scores: Tensor) -> Tensor:
        """Queue a copy of a step's scores, and return where it goes."""
        count = scores.numel()
        if self.scores.numel() < count:
            self.scores = self._accelerator.host_buffer((2 * count,), torch.float32)
        host = self.scores[:count].view(scores.shape)
        if count:
            self._accelerator.download(scores, host)
        return host
