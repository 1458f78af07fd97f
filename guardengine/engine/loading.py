"""load_engine(): from a checkpoint folder and options to what an Engine is made of.

The one place where sizes, dtypes and the backend are decided; nothing falls back, what is not possible is an
error that says what is.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from guardengine.checkpoint.files import open_checkpoint, stop_ids
from guardengine.checkpoint.fingerprint import Fingerprint, Numerics
from guardengine.checkpoint.model_config import GuardHeadsConfig, ModelConfig
from guardengine.checkpoint.weights import load_weights
from guardengine.config import EngineConfig
from guardengine.core.block_pool import BlockPool
from guardengine.core.engine_core import EngineCore
from guardengine.core.prefix_cache import PrefixCache
from guardengine.core.readout import HiddenReadout, Readout
from guardengine.errors import CheckpointError, ConfigError
from guardengine.gen.answering import Answering
from guardengine.gen.grammar import Grammar
from guardengine.gen.prompts import shared_prefixes
from guardengine.kernels import BACKENDS, abi, load
from guardengine.kernels.quantization import SCHEMES
from guardengine.labels import Role
from guardengine.records.audit_log import AuditRecorder
from guardengine.runners import accelerator
from guardengine.runners.cores import memory_bytes
from guardengine.runners.cpu_runner import CpuRunner
from guardengine.runners.gpu_limits import DeviceMemory, check_bfloat16, check_shapes
from guardengine.runners.gpu_runner import GpuRunner
from guardengine.runners.kv_cache import CacheShape
from guardengine.runners.runner import Runner
from guardengine.runners.torch_runner import TorchRunner
from guardengine.text.chat_template import ChatTemplate
from guardengine.text.tokenizer import Tokenizer

logger = logging.getLogger("guardengine")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_KV_DTYPES = {**_DTYPES, "int8": torch.int8}
_DEFAULT_KV_CACHE_BYTES = 4 * 2**30
# Of a GPU's memory that weights and work leave: the guarded LLM may live there too.
_DEFAULT_KV_CACHE_SHARE = 0.5


class LoadedEngine(NamedTuple):
    """The parts of an Engine. chat is None where the checkpoint has no tokenizer; heads are None for Gen, which has
    `answering` where there is a tokenizer."""

    core: EngineCore
    chat: ChatTemplate | None
    heads: GuardHeadsConfig | None
    answering: Answering | None


class Placement(NamedTuple):
    """What runs the model, and where."""

    backend: str
    device: torch.device


def choose_backend(backend: str, device: str, quantization: str | None) -> Placement:
    """The backend's name and the device. Raises ConfigError, naming what there is.

    "auto" takes the GPU and its kernels where there is one that they run on, unless weights are to be quantized,
    which the cpu backend alone does.
    """
    if quantization is not None and quantization not in SCHEMES:
        raise ConfigError(f"quantization={quantization!r}: choose None or one of {', '.join(SCHEMES)}")
    if backend not in ("auto", *BACKENDS):
        raise ConfigError(f"backend={backend!r}: choose 'auto' or one of {', '.join(BACKENDS)}")
    if device == "auto":
        needs_cpu = backend in ("cpu", "reference") or (backend == "auto" and quantization is not None)
        chosen = torch.device("cpu") if needs_cpu else accelerator.default_device()
    else:
        chosen = accelerator.parse_device(device)
    name = ("triton" if chosen.type == "cuda" else "cpu") if backend == "auto" else backend
    if name == "cpu" and chosen.type != "cpu":
        raise ConfigError(
            f"backend='cpu' with device={device!r}: pass device='cpu', or backend='triton' for the GPU"
        )
    if name == "triton":
        if quantization is not None:
            raise ConfigError(
                f"quantization={quantization!r}: the triton backend runs weights in the model's dtype only; "
                "use backend='cpu', or quantization=None"
            )
        accelerator.check_triton()
    return Placement(name, chosen)


def load_engine(
    folder: Path,
    options: EngineConfig,
    placement: Placement,
    dtype: str,
    quantization: str | None,
    *,
    progress: bool,
) -> LoadedEngine:
    """Load a checkpoint. Raises CheckpointError and ConfigError."""
    if dtype not in ("auto", *_DTYPES):
        raise ConfigError(f"dtype={dtype!r}: 'auto', 'float32' or 'bfloat16' is needed")
    with open_checkpoint(folder) as checkpoint:
        config = checkpoint.config
        if config.heads is None and options.audit_log is not None:
            raise ConfigError(
                f"audit_log={str(options.audit_log)!r}: an audit log is of labels, and a Gen checkpoint gives none; "
                "leave it out, and keep the answers"
            )
        chosen = "bfloat16" if config.dtype == "bfloat16" else "float32"
        model_dtype = _DTYPES[chosen if dtype == "auto" else dtype]
        kv_dtype = model_dtype if options.kv_dtype == "auto" else _KV_DTYPES[options.kv_dtype]
        max_model_len = _max_model_len(options, config)
        device_memory = None
        if placement.device.type == "cuda":
            device_memory = DeviceMemory.of(placement.device, options, config, model_dtype, max_model_len)
        fingerprint = Fingerprint(
            (folder / "config.json", *checkpoint.files),
            Numerics(_name(model_dtype), quantization, _name(kv_dtype)),
        )
        cache = CacheShape(
            num_blocks=_num_blocks(options, config, max_model_len, kv_dtype, device_memory),
            block_size=options.block_size,
            dtype=kv_dtype,
        )
        if device_memory is not None:
            device_memory.check(cache.num_bytes(config))
        runner: Runner
        if placement.backend == "cpu":
            if options.block_size % abi.KEY_GROUP:
                logger.warning(
                    "block_size=%d is not a multiple of %d: attention copies keys and values before it multiplies",
                    options.block_size,
                    abi.KEY_GROUP,
                )
            runner = CpuRunner(
                checkpoint,
                cache,
                model_dtype,
                max_model_len,
                quantization=quantization,
                num_threads=options.num_threads,
                pin_threads=options.pin_threads,
                progress=progress,
            )
        else:
            target = None
            if placement.backend == "triton":
                check_shapes(config, options)
                target = accelerator.choose_accelerator(placement.device)
            ops = load(placement.backend)
            if target is not None:
                check_bfloat16(ops, model_dtype, target)
            weights = load_weights(
                checkpoint, model_dtype, placement.device, quantization=quantization, progress=progress
            )
            if target is not None and config.heads is not None:
                runner = GpuRunner(
                    ops, config, weights, cache, max_model_len, options.max_num_batched_tokens, target
                )
            else:
                if options.num_threads is not None:
                    torch.set_num_threads(options.num_threads)
                runner = TorchRunner(ops, config, weights, cache, max_model_len)
    readout = HiddenReadout() if config.heads is None else Readout(config.heads)
    prefix_cache = PrefixCache(cache.block_size) if options.prefix_caching else None
    chat = _load_chat(folder, config)
    recorder = None
    if options.audit_log is not None:
        recorder = AuditRecorder(
            options.audit_log,
            keeps_token_ids=options.audit_token_ids,
            fingerprint=fingerprint,
            runner=runner,
            readout=readout,
            block_size=cache.block_size,
        )
    core = EngineCore(
        config,
        runner,
        readout,
        BlockPool(cache.num_blocks, cache.block_size, prefix_cache),
        options,
        max_model_len,
        fingerprint,
        recorder=recorder,
    )
    answering = None
    if config.heads is None and chat is not None:
        answering = _load_answering(core, chat, folder)
    return LoadedEngine(core, chat, config.heads, answering)


def _load_answering(core: EngineCore, chat: ChatTemplate, folder: Path) -> Answering:
    grammars = {
        role: Grammar(chat.tokenizer.encode_text, role, chat.end_of_turn_id) for role in get_args(Role)
    }
    return Answering(core, grammars, stop_ids(folder), shared_prefixes(chat))


def _max_model_len(options: EngineConfig, config: ModelConfig) -> int:
    if options.max_model_len is None:
        return config.max_position_embeddings
    if options.max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={options.max_model_len}: the model was trained for "
            f"{config.max_position_embeddings} tokens (max_position_embeddings); ask for no more"
        )
    return options.max_model_len


def _num_blocks(
    options: EngineConfig,
    config: ModelConfig,
    max_model_len: int,
    kv_dtype: torch.dtype,
    device_memory: DeviceMemory | None,
) -> int:
    """KV blocks that `kv_cache_bytes` buys; without it, what all streams could use, up to a default's worth."""
    size = CacheShape(1, options.block_size, kv_dtype).num_bytes(config)
    if options.kv_cache_bytes is None:
        usable = options.max_num_streams * -(-max_model_len // options.block_size)
        if device_memory is None:
            budget = min(_DEFAULT_KV_CACHE_BYTES, memory_bytes("MemAvailable") // 2)
        else:
            budget = int(device_memory.left * _DEFAULT_KV_CACHE_SHARE)
        return max(1, min(usable, budget // size))
    if options.kv_cache_bytes < size:
        raise ConfigError(
            f"kv_cache_bytes={options.kv_cache_bytes}: one block of {options.block_size} tokens takes {size} bytes"
        )
    return options.kv_cache_bytes // size


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _load_chat(folder: Path, config: ModelConfig) -> ChatTemplate | None:
    if not (folder / "tokenizer.json").exists():
        logger.info("%s has no tokenizer.json: token ids can be moderated, text cannot", folder)
        return None
    tokenizer = Tokenizer.from_dir(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} has ids up to {tokenizer.vocab_size - 1}, but config.json says vocab_size="
            f"{config.vocab_size}; take both files from one and the same checkpoint"
        )
    return ChatTemplate.from_dir(folder, tokenizer, config.kind)
