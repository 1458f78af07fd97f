"""CpuRunner: owns packed weights and the KV cache, and runs whole batches in one native call. Knows no streams.

Matrices are packed straight from the mapped checkpoint into the native model's memory. Embedding, norms and rope
table are tensors here that the native side reads in place.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from guardengine.checkpoint.files import Checkpoint
from guardengine.checkpoint.model_config import GuardHeadsConfig, ModelConfig
from guardengine.checkpoint.weights import check_tensors, tensor_shapes
from guardengine.errors import ConfigError
from guardengine.kernels import abi, native
from guardengine.kernels.abi import Matrix
from guardengine.kernels.rope import rope_table
from guardengine.runners.batch import Batch
from guardengine.runners.cores import load_library, physical_cores
from guardengine.runners.kv_cache import CacheShape, KVCache
from guardengine.runners.lm_head import LmHead
from guardengine.runners.runner import Computed, RunnerInfo, Scores

_SIDES = ("", "query_")


@dataclass(frozen=True, slots=True)
class VectorWeights:
    """The weights that are not packed: read in place by the native model."""

    embed: Tensor  # [V, E]
    layer_norms: Tensor  # [layers, 2 * E + 2 * D] float32: input, post-attention, query, key
    norm: Tensor  # [E] float32
    guard_norms: Tensor  # [2, G] float32: response, query; [0] without guard heads
    lm_head: Tensor | None  # [V, E] of a Gen checkpoint; `embed` itself when tied


class CpuRunner:
    """Executes a checkpoint natively over a paged KV cache.

    Peak memory: what the model keeps, plus one layer where the checkpoint stores another dtype. Results are the
    same bits for any batch, chunking and number of threads.

    Args:
        checkpoint: Of any kind; not read any more once this returns.
        cache: Size and dtype of the KV cache to allocate.
        dtype: Of the weights, float32 or bfloat16.
        max_model_len: Tokens of a stream at most.
        quantization: Of the layers' matrices, "int8" or "w8a8".
        num_threads: By default one for each core that this process may use.
        pin_threads: Whether each thread stays on a core of its own.
        progress: Whether a bar shows how many layers are loaded.

    Raises:
        CheckpointError: Something is wrong with the tensors. Nothing was loaded.
        ConfigError: This backend or machine cannot run it. Nothing was loaded.
        MemoryError: The weights do not fit.
    """

    max_in_flight = 1

    def __init__(
        self,
        checkpoint: Checkpoint,
        cache: CacheShape,
        dtype: torch.dtype,
        max_model_len: int,
        *,
        quantization: str | None = None,
        num_threads: int | None = None,
        pin_threads: bool = False,
        progress: bool = False,
    ) -> None:
        config, heads = checkpoint.config, checkpoint.config.heads
        _check_shape(config)
        check_tensors(checkpoint)
        self._workers = _start_workers(num_threads, pin_threads)
        self.info = RunnerInfo(
            backend="cpu",
            config=config,
            device=torch.device("cpu"),
            dtype=dtype,
            quantization=quantization,
            isa=self._workers.isa,
            num_threads=self._workers.num_threads,
        )
        self.kv_cache = _allocate_cache(cache, config)
        self._cos_sin = rope_table(config.head_dim, config.rope_theta, max_model_len)
        stored = _StoredTensors(checkpoint)
        self.weights = weights = _vector_weights(stored, dtype)
        self.lm_head: LmHead | None = None
        if weights.lm_head is not None:
            self.lm_head = LmHead(weights.lm_head, _LazyProduct(self._workers, weights.lm_head))
        self._model = self._create_model(heads, cache.block_size)
        self._free_model = weakref.finalize(self, native.library().ge_model_destroy, self._model)
        for layer in tqdm(range(config.num_layers), "loading layers", unit="layer", disable=not progress):
            name = f"model.layers.{layer}."
            self._pack(
                Matrix.QKV, layer, [stored.get(f"{name}self_attn.{part}_proj", dtype) for part in "qkv"]
            )
            self._pack(Matrix.O, layer, [stored.get(f"{name}self_attn.o_proj", dtype)])
            self._pack(
                Matrix.GATE_UP,
                layer,
                [stored.get(f"{name}mlp.{part}_proj", dtype) for part in ("gate", "up")],
            )
            self._pack(Matrix.DOWN, layer, [stored.get(f"{name}mlp.down_proj", dtype)])
        if heads is None:
            return
        self._pack(Matrix.PRE, 0, [stored.get(f"{side}risk_level_category_pre", dtype) for side in _SIDES])
        for matrix, side in ((Matrix.RESPONSE, ""), (Matrix.QUERY, "query_")):
            parts = [stored.get(f"{side}{kind}_head", dtype) for kind in ("risk_level", "category")]
            self._pack(matrix, 0, parts)

    def launch(self, batch: Batch) -> Computed:
        """Compute one batch.

        Raises RuntimeError in a forked child, and MemoryError when there is no room for the batch's rows; nothing
        was computed then.
        """
        self._workers.check_process()
        config, num_rows = self.info.config, len(batch.label_index)
        if config.heads is None:
            out = torch.empty((num_rows, config.hidden_size), dtype=self.info.dtype)
        else:
            out = torch.empty((num_rows, config.heads.num_logits))
        rows, label_rows, cache = batch.rows, batch.label_rows, self.kv_cache
        num_streams, blocks_per_table = batch.block_tables.shape
        call = abi.BatchStruct(
            num_tokens=len(batch.input_ids),
            num_streams=num_streams,
            blocks_per_table=blocks_per_table,
            num_labels=num_rows,
            input_ids=batch.input_ids.data_ptr(),
            positions=rows.positions.data_ptr(),
            cu_seqlens=rows.cu_seqlens_q.data_ptr(),
            slot_mapping=batch.slot_mapping.data_ptr(),
            block_tables=batch.block_tables.data_ptr(),
            label_index=batch.label_index.data_ptr(),
            label_positions=label_rows.positions.data_ptr(),
            label_cu_seqlens=label_rows.cu_seqlens_q.data_ptr(),
            kv_cache=cache.values.data_ptr(),
            kv_scales=None if cache.scales is None else cache.scales.data_ptr(),
            out=out.data_ptr(),
        )
        native.check(native.library().ge_step(self._model, ctypes.byref(call)))
        return Computed(Scores(out.float().numpy()))

    def copy_block(self, source: int, destination: int) -> None:
        """Copy one block's keys and values in every layer."""
        self.kv_cache.copy_block(source, destination)

    def close(self) -> None:
        """Free weights, KV cache and threads; nothing can run afterwards."""
        self._free_model()
        self._workers.close()
        self.lm_head = None
        del self.weights, self.kv_cache

    def _create_model(self, heads: GuardHeadsConfig | None, block_size: int) -> int:
        config, weights = self.info.config, self.weights
        struct = abi.ModelStruct(
            num_layers=config.num_layers,
            hidden=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate=config.intermediate_size,
            dtype=native.DTYPES[self.info.dtype],
            kv_dtype=native.DTYPES[self.kv_cache.dtype],
            block_size=block_size,
            format=native.FORMATS[self.info.quantization],
            eps=config.rms_norm_eps,
            embed=weights.embed.data_ptr(),
            layer_norms=weights.layer_norms.data_ptr(),
            final_norm=weights.norm.data_ptr(),
            guard_norms=weights.guard_norms.data_ptr(),
            cos_sin=self._cos_sin.data_ptr(),
        )
        if heads is not None:  # else they are 0
            struct.guard_inner = heads.inner_size
            struct.response_logits = len(heads.response_risks) + len(heads.response_categories)
            struct.query_logits = len(heads.query_risks) + len(heads.query_categories)
        model: int | None = native.library().ge_model_create(self._workers.handle, ctypes.byref(struct))
        if not model:
            raise MemoryError(
                "the packed weights do not fit into memory; free some, or use a smaller checkpoint"
            )
        return model

    def _pack(self, matrix: Matrix, layer: int, parts: Sequence[Tensor]) -> None:
        native.library().ge_model_pack(self._model, matrix, layer, *native.pointers(parts))


class _LazyProduct:
    """The product with a whole language model's head, which is packed when it is first asked for: answers that are
    chosen among few tokens never do."""

    def __init__(self, workers: native.Workers, weight: Tensor) -> None:
        self._workers, self._weight = workers, weight

    @functools.cached_property
    def _packed(self) -> native.Packed:
        return native.Packed(self._workers, self._weight)

    def __call__(self, rows: Tensor) -> Tensor:
        """Shapes: rows [W, E] -> [W, V] float32."""
        self._workers.check_process()
        product: Tensor = native.linear(self._workers, rows, self._packed, is_float_out=True)
        return product


class _StoredTensors:
    """A checkpoint's tensors by name, in a dtype: the mapped file itself where that is the stored one."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._shapes = checkpoint, tensor_shapes(checkpoint.config)

    def get(self, name: str, dtype: torch.dtype) -> Tensor:
        name += ".weight"
        return self._checkpoint.tensor(name, self._shapes[name]).to(dtype)

    def join(self, names: Sequence[str]) -> Tensor:
        return torch.cat([self.get(name, torch.float32) for name in names])


def _vector_weights(stored: _StoredTensors, dtype: torch.dtype) -> VectorWeights:
    """Copies: the file may be cut or replaced while the engine serves, which would kill the process."""
    config = stored._checkpoint.config
    layer_norms = [
        stored.join(
            [f"model.layers.{layer}.{part}" for part in ("input_layernorm", "post_attention_layernorm")]
            + [f"model.layers.{layer}.self_attn.{part}_norm" for part in "qk"]
        )
        for layer in range(config.num_layers)
    ]
    embed = stored.get("model.embed_tokens", dtype).clone()
    guard_norms, lm_head = torch.empty(0), None
    if config.heads is not None:
        guard_norms = torch.stack([stored.join([f"{side}risk_level_category_layernorm"]) for side in _SIDES])
    else:
        lm_head = embed if config.tie_word_embeddings else stored.get("lm_head", dtype).clone()
    return VectorWeights(
        embed=embed,
        layer_norms=torch.stack(layer_norms),
        norm=stored.join(["model.norm"]),
        guard_norms=guard_norms,
        lm_head=lm_head,
    )


def _allocate_cache(cache: CacheShape, config: ModelConfig) -> KVCache:
    """A cache with its blocks first.

    Pages of blocks that are never used cost no memory. A block is contiguous over all layers, so that huge pages do
    not change that; with small ones a quarter of attention's time over long contexts goes into finding pages.
    """
    shape = (cache.num_blocks, config.num_layers, 2, config.num_kv_heads, cache.block_size)
    count = math.prod(shape) * config.head_dim
    memory = mmap.mmap(-1, count * cache.dtype.itemsize)
    # Not everywhere, and refused on some kernels: only slower.
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    values = torch.frombuffer(memory, dtype=cache.dtype, count=count).view(*shape, config.head_dim)
    scales = torch.empty(shape, dtype=torch.float32) if cache.dtype == torch.int8 else None
    return KVCache(values, scales, block_axis=0)


def _check_shape(config: ModelConfig) -> None:
    sizes = {
        "hidden_size": config.hidden_size,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
    }
    if config.heads is not None:
        sizes["guard_inner_size"] = config.heads.inner_size
    for key, size in sizes.items():
        if size % 32:
            raise ConfigError(
                f"{key}={size}: the cpu backend needs a multiple of 32; use backend='reference'"
            )
    widths = {
        "head_dim": (config.head_dim, abi.MAX_HEAD_DIM),
        "hidden_size": (config.hidden_size, abi.MAX_INNER),
        "intermediate_size": (config.intermediate_size, abi.MAX_INNER),
        "num_attention_heads * head_dim": (config.num_heads * config.head_dim, abi.MAX_INNER),
        "num_attention_heads / num_key_value_heads": (
            config.num_heads // config.num_kv_heads,
            abi.MAX_GROUP,
        ),
    }
    for key, (size, largest) in widths.items():
        if size > largest:
            raise ConfigError(
                f"{key} is {size}: the cpu backend's kernels take {largest} at most; use backend='reference'"
            )


def _start_workers(num_threads: int | None, pin_threads: bool) -> native.Workers:
    cores = physical_cores()
    count = len(cores) if num_threads is None else num_threads
    if pin_threads and count > len(cores):
        raise ConfigError(
            f"pin_threads=True with num_threads={count}: this process may use {len(cores)} core(s); ask for no more"
        )
    load_library()  # names what is wrong with the library, where something is
    try:
        return native.Workers(native.choose_isa(), count, cores[:count] if pin_threads else None)
    except (ValueError, MemoryError) as error:
        raise ConfigError(str(error)) from None
