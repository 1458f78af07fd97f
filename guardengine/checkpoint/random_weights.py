"""make_checkpoint(): random weights in the layout of the released checkpoints, for machines without real ones.

config.json, names, shapes, dtype and files are those of the published checkpoints; only the numbers are meaningless.
They depend on (preset, seed, tensor name) alone, so every machine writes the same bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from guardengine import checks
from guardengine.checkpoint.model_config import QUERY_CATEGORIES, RESPONSE_CATEGORIES, RISKS, ModelConfig
from guardengine.checkpoint.outliers import EMBEDDING_STD, Outliers, norm_quantiles
from guardengine.checkpoint.presets import PRESETS, SIZE_KEYS
from guardengine.checkpoint.weights import tensor_shapes
from guardengine.errors import CheckpointError, ConfigError

logger = logging.getLogger("guardengine")

_LABEL_MAPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "response_risk_level_map": ("num_risk_level", RISKS),
    "response_category_map": ("num_category", RESPONSE_CATEGORIES),
    "query_risk_level_map": ("num_query_risk_level", RISKS),
    "query_category_map": ("num_query_category", QUERY_CATEGORIES),
}
_COMMON_OPTIONS = (
    *SIZE_KEYS,
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "dtype",
    "config_names",
)
_DTYPES: dict[str, tuple[str, torch.dtype]] = {
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
    "float32": ("F32", torch.float32),
}
_GENERATION = {"bos_token_id": 151643, "eos_token_id": [151645, 151643], "pad_token_id": 151643}
_TOKENIZER_IDS = 151669  # ids that the released tokenizer uses
_CHUNK = 2**20  # values that are made at a time; they fit into the processor's cache
_RESERVE_BYTES = 64 * 2**20  # of disk space, for the tokenizer and the JSON files


def make_checkpoint(
    directory: Path,
    preset: str,
    *,
    seed: int = 0,
    max_shard_bytes: int = 5_000_000_000,
    weight_std: float | None = None,
    outliers: bool = False,
    progress: bool = False,
    **overrides: Any,
) -> Path:
    """Write a checkpoint with random weights. The folder appears only when it is complete.

    Args:
        directory: A new or empty folder.
        preset: A key of PRESETS.
        seed: 0 to 2**64 - 1.
        max_shard_bytes: Larger weights are split into several files with an index.
        weight_std: Standard deviation of the linear layers. None: 0.64 / sqrt(inputs), which is 0.02 at a width of
            1024.
        outliers: Plant the outlier channels of trained models (see guardengine.checkpoint.outliers), with which
            quantization has to cope. Without them weights are independent, and quantizing them looks better than it
            is.
        progress: Show a progress bar.
        **overrides: Keys of config.json such as num_hidden_layers=3 or vocab_size=512; the label maps as sequences of
            names; dtype: "bfloat16", "float16" or "float32"; config_names: "v4" (as published) or "v5"
            (`rope_parameters` and `dtype` in place of `rope_theta` and `torch_dtype`).

    Returns:
        The folder.

    Raises:
        ConfigError: A name is unknown, a value fits no model, the folder is in use, or the disk is full.
    """
    raw = _config_json(preset, overrides)
    try:
        config = ModelConfig.from_dict(raw, f"preset {preset}")
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    checks.whole_number("seed", seed, 0, 2**64 - 1)
    checks.whole_number("max_shard_bytes", max_shard_bytes, 1)
    if weight_std is not None and not 0 < weight_std < 100:
        raise ConfigError(f"weight_std={weight_std!r}: pass a number above 0 and below 100")
    shapes = tensor_shapes(config)
    if config.kind == "gen":
        # The published files store the head even where it is tied to the embedding.
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    item_bytes = _DTYPES[config.dtype][1].itemsize
    target = Path(os.path.expanduser(directory)).resolve()
    try:
        _refuse_folder_in_use(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(_count(shape) for shape in shapes.values()) * item_bytes + _RESERVE_BYTES
        free = shutil.disk_usage(target.parent).free
        if needed > free:
            raise ConfigError(
                f"{target}: {preset} needs {needed / 1e9:.2f} GB on disk, {free / 1e9:.2f} GB are free; make "
                "room or choose another folder"
            )
        # A sibling, so that the rename at the end stays on one file system and is all or nothing.
        partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
        partial.mkdir()
        try:
            _write_json(partial / "config.json", raw)
            if config.kind == "gen":
                _write_json(partial / "generation_config.json", _GENERATION)
            values = _WeightSource(config, f"{preset}/{seed}", weight_std, outliers)
            _write_weights(partial, shapes, config.dtype, max_shard_bytes, values, progress)
            _write_tokenizer(partial, config)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and os.path.exists(target):
            raise ConfigError(f"{target} is in use now; give a new or empty folder") from error
        raise ConfigError(
            f"{target} cannot be written ({error}); choose a folder that can be written, with enough room"
        ) from error
    return Path(directory)


def preset_config(preset: str) -> ModelConfig:
    """The configuration of a checkpoint that `make_checkpoint` writes for a preset. Raises ConfigError for an unknown
    name."""
    return ModelConfig.from_dict(_config_json(preset, {}), f"preset {preset}")


def _config_json(preset: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, in the published form, from a preset and overrides."""
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
    is_stream = preset.startswith("stream-")
    options = sorted((*_COMMON_OPTIONS, *(("guard_inner_size", *_LABEL_MAPS) if is_stream else ())))
    unknown = sorted(set(overrides) - set(options))
    if unknown:
        raise ConfigError(f"unknown override(s) {', '.join(unknown)}; {preset} takes {', '.join(options)}")
    chosen = {
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        **PRESETS[preset],
        **overrides,
    }
    names = chosen.pop("config_names", "v4")
    if names not in ("v4", "v5"):
        raise ConfigError(f"config_names={names!r}: choose 'v4' (as published) or 'v5'")
    dtype = chosen.pop("dtype", "bfloat16")
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r}: {', '.join(_DTYPES)} are the dtypes of a checkpoint")
    theta = chosen.pop("rope_theta")
    raw: dict[str, Any] = {
        "architectures": [chosen.pop("architecture")],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": chosen["num_hidden_layers"],
        "model_type": "qwen3",
        "sliding_window": None,
        "use_cache": not is_stream,
        "use_sliding_window": False,
    }
    if names == "v4":
        raw |= {
            "rope_theta": theta,
            "rope_scaling": None,
            "torch_dtype": dtype,
            "transformers_version": "4.55.0",
        }
    else:
        raw |= {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "dtype": dtype}
        raw |= {"transformers_version": "5.0.0"}
    if is_stream:
        raw["auto_map"] = {
            "AutoConfig": "configuration_qwen3.Qwen3Config",
            "AutoModel": "modeling_qwen3_guard.Qwen3ForGuardModel",
        }
        for key, (count_key, default) in _LABEL_MAPS.items():
            labels = chosen.pop(key, default)
            if isinstance(labels, str) or not isinstance(labels, Sequence) or not labels:
                raise ConfigError(f"{key}={labels!r}: pass a sequence of label names")
            raw[key] = {str(index): label for index, label in enumerate(labels)}
            raw[count_key] = len(labels)
    return dict(sorted((raw | chosen).items()))


def _refuse_folder_in_use(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; give a new or empty folder")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty and is not overwritten; give a new or empty folder")


def _write_tokenizer(folder: Path, config: ModelConfig) -> None:
    if config.vocab_size < _TOKENIZER_IDS:
        logger.info("no tokenizer written: vocab_size=%d has no room for its ids", config.vocab_size)
        return
    from guardengine.text.vocabulary import write_tokenizer_files

    if not write_tokenizer_files(folder, config.max_position_embeddings, config.kind):
        logger.warning(
            "no tokenizer written, because the public Qwen vocabulary is not installed: the checkpoint takes token "
            "ids, not text; for text `pip install dashscope` and make it again, or add Qwen3's tokenizer.json"
        )


def _write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    max_shard_bytes: int,
    values: _WeightSource,
    progress: bool,
) -> None:
    """Write model.safetensors, or shards and their index, tensor by tensor."""
    item_bytes = _DTYPES[dtype][1].itemsize
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, shape in shapes.items():
        size_bytes = _count(shape) * item_bytes
        if shards[-1] and shard_bytes + size_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += size_bytes
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(_count(shape) for shape in shapes.values()) * item_bytes
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)
    with tqdm(total=len(shapes), desc="writing tensors", unit="tensor", disable=not progress) as bar:
        for file, names in zip(files, shards, strict=True):
            _write_safetensors(
                folder / file, {name: shapes[name] for name in names}, dtype, values.chunks, bar.update
            )


def _write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    chunks: Callable[[str, tuple[int, ...]], Iterable[npt.NDArray[Any]]],
    done: Callable[[], object],
) -> None:
    stored_dtype, torch_dtype = _DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _count(shape) * torch_dtype.itemsize
        header[name] = {"dtype": stored_dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8
    file: BinaryIO
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, shape in shapes.items():
            for chunk in chunks(name, shape):
                file.write(chunk.data)
            done()


class _WeightSource:
    """Random values for every tensor, scaled so that activations and logits have the size of those of a trained
    model."""

    def __init__(self, config: ModelConfig, key: str, weight_std: float | None, outliers: bool) -> None:
        self.config, self.key, self.weight_std = config, key, weight_std
        self.dtype = _DTYPES[config.dtype][1]
        self.outliers = Outliers(config, key) if outliers else None

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterable[npt.NDArray[Any]]:
        """The stored values of a tensor, in order."""
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        table = self._table(name, shape)
        planted = None if self.outliers is None else self.outliers.planted(name, shape)
        digest = hashlib.sha256(f"{self.key}/{name}".encode()).digest()
        bits = np.random.PCG64(int.from_bytes(digest))
        size = _count(shape)
        for start in range(0, size, _CHUNK):
            count = min(size - start, _CHUNK)
            # Four 16-bit indices a draw. Raw draws and little-endian views: the same bytes on every machine.
            indices = bits.random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]
            chunk = table[indices]
            if planted is not None:
                part = slice(*np.searchsorted(planted.indices, (start, start + count)))
                where = planted.indices[part] - start
                deviations = planted.stds[part] * _normal_quantiles()[indices[where]]
                chunk[where] = self._as_stored(planted.means[part] + deviations)
            yield chunk

    def _table(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """The 65536 values from which a tensor is drawn: quantiles of a normal distribution."""
        mean, std = 0.0, self.weight_std or 0.64 / shape[-1] ** 0.5
        if len(shape) == 1:
            if self.outliers is not None:
                return self._as_stored(norm_quantiles(_normal_quantiles()))
            mean, std = 1.0, 0.1  # norms
        elif name.endswith("_pre.weight"):
            std = 1.0 / shape[-1] ** 0.5
        elif name.endswith(("_head.weight", "embed_tokens.weight")):
            std = 2.0 / shape[-1] ** 0.5  # logits get a standard deviation of 2, so labels differ
        if self.outliers is not None and name.endswith("embed_tokens.weight"):
            std = EMBEDDING_STD
        return self._as_stored(mean + std * _normal_quantiles())

    def _as_stored(self, values: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
        """Rounded to the checkpoint's dtype, as little-endian numbers or bit patterns."""
        rounded = torch.from_numpy(values).to(self.dtype)
        is_float32 = self.dtype == torch.float32
        as_stored = rounded if is_float32 else rounded.view(torch.uint16)
        return as_stored.numpy().astype(f"<{'f4' if is_float32 else 'u2'}", copy=False)


@cache
def _normal_quantiles() -> npt.NDArray[np.float64]:
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)])


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
