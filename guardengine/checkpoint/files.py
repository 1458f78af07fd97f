"""Checkpoint: a folder with config.json and safetensors files, opened without trusting any of it.

The header of a safetensors file is read and checked completely before anything is mapped: no pickle, no code from the
checkpoint, no allocation whose size a file claims. Tensors are views on the mapped files. Knows no model.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from guardengine.checkpoint.model_config import ModelConfig
from guardengine.errors import CheckpointError

# The safetensors format's own limit on the JSON header.
MAX_HEADER_BYTES = 100_000_000
_MAX_JSON_BYTES = 100_000_000  # of config.json and of the index
_MAX_RANK = 16
_GIT_LFS = b"version https://git-lfs"
_AGAIN = "download the file again"

# Bits per element of every dtype the safetensors format knows; only the three in _READABLE are ever read.
_DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_READABLE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The place of one tensor, checked against the size of the file.

    Attributes:
        path: The file.
        dtype: The dtype by its name in the file.
        shape: The shape.
        offset: Index of its first byte in the file.
        size_bytes: Its size.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class Checkpoint:
    """An open checkpoint folder. Made by `open_checkpoint`; use it in a `with` block.

    A view stays valid after `close`, because its mapping lives as long as the view. The files must not be truncated
    while views are in use (the operating system would stop the process); they may be deleted.
    """

    def __init__(
        self, path: Path, config: ModelConfig, entries: dict[str, TensorEntry], maps: dict[Path, mmap.mmap]
    ) -> None:
        self.path, self.config = path, config
        self._entries, self._maps = entries, maps
        self._is_open = True

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of all stored tensors, in file order."""
        return tuple(self._entries)

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(self._maps)

    def entry(self, name: str) -> TensorEntry:
        """The entry of a tensor. Raises CheckpointError when the tensor is not stored."""
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"{self.path}: tensor {name} is missing; the checkpoint is incomplete or of another model: "
                "download it again"
            )
        return entry

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A view of one stored tensor on the mapped file, without a copy. Writing to it never changes the file.

        Args:
            name: The stored name.
            shape: The shape that config.json implies.

        Returns:
            float32, float16 or bfloat16, as stored.

        Raises:
            CheckpointError: It is not stored, has another shape or dtype, or the checkpoint is closed.
        """
        entry = self.entry(name)
        if not self._is_open:
            raise CheckpointError(f"{self.path}: tensor {name} was asked for after close(); open it again")
        dtype = _READABLE.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{entry.path}: tensor {name} is stored as {entry.dtype}, but only "
                f"{', '.join(_READABLE)} are read; use the published bfloat16 checkpoint"
            )
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.path}: tensor {name} has shape {list(entry.shape)}, but config.json asks for "
                f"{list(shape)}; take config.json and the weights from one and the same checkpoint"
            )
        if not entry.size_bytes:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(
            self._maps[entry.path],
            dtype=dtype,
            count=entry.size_bytes // dtype.itemsize,
            offset=entry.offset,
        )
        return flat.view(shape)

    def close(self) -> None:
        """Release the files; safe to call twice. Views that are in use stay valid."""
        self._is_open = False
        # Not mmap.close(): that would unmap the memory under views that are still alive.
        self._maps = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder with config.json and model.safetensors (or model.safetensors.index.json and its shards).

    Reads the JSON files and the safetensors headers and maps the files; no weight is read. Raises CheckpointError
    naming the file, the tensor or key, and what to do.
    """
    try:
        return _open(Path(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); check its permissions") from error


def _open(path: Path) -> Checkpoint:
    if not os.path.isdir(path):  # not path.is_dir(): that raises for a name that is too long
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise CheckpointError(f"{path} {what}; give the folder with config.json and the *.safetensors files")
    config_path = path / "config.json"
    if not config_path.exists():
        raise CheckpointError(
            f"{config_path} is missing; give the folder of a complete Qwen3Guard checkpoint"
        )
    config = ModelConfig.from_dict(_read_json(config_path), str(config_path))
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        entries, mapped = _open_safetensors(single)
        return Checkpoint(path, config, entries, {single: mapped})
    if index.exists():
        return _open_shards(path, config, index)
    raise CheckpointError(_no_weights(path))


def _no_weights(path: Path) -> str:
    missing = f"{path} has neither model.safetensors nor model.safetensors.index.json"
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        return f"{missing}, and cannot be listed ({error}); check its permissions"
    shards = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if shards:
        return f"{missing}, only {shards[0]}; download model.safetensors.index.json from the same place"
    if pickles:
        return (
            f"{missing}, only {pickles[0]}: pickle files are never read, loading one runs its code; "
            "download the *.safetensors files"
        )
    return f"{missing}; download the *.safetensors files of the checkpoint"


def _open_shards(path: Path, config: ModelConfig, index: Path) -> Checkpoint:
    raw = _read_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, Mapping) else None
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index}: `weight_map` is not an object that maps tensors to files; {_AGAIN}")
    for name, shard in weight_map.items():
        # Only plain names. A file in the folder may be a symlink, because its owner made it so; but the index, which
        # may come from anywhere, must not choose a file outside the folder.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\:\0"):
            raise CheckpointError(
                f"{index}: tensor {shorten(name)} is said to be in {shorten(shard)}, but only the names of "
                f"*.safetensors files in the same folder are allowed; {_AGAIN}"
            )
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (path / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{path / absent[0]} is missing ({len(absent)} of {len(shards)} files of {index.name} are); "
            "download the missing files"
        )
    entries: dict[str, TensorEntry] = {}
    maps: dict[Path, mmap.mmap] = {}
    for shard in shards:
        found, maps[path / shard] = _open_safetensors(path / shard)
        for name, entry in found.items():
            if name in entries:
                raise CheckpointError(
                    f"{path / shard}: tensor {shorten(name)} is also stored in {entries[name].path.name}; "
                    "download all shards again from one revision"
                )
            if weight_map.get(name) != shard:
                where = shorten(weight_map[name]) if name in weight_map else "no file"
                raise CheckpointError(
                    f"{path / shard}: tensor {shorten(name)} is stored here, but {index.name} says in {where}; "
                    "download the index and all shards again from one revision"
                )
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries:
            raise CheckpointError(
                f"{path / shard}: tensor {shorten(name)} is not stored here, although {index.name} says so; "
                "download the index and all shards again from one revision"
            )
    return Checkpoint(path, config, entries, maps)


def _open_safetensors(path: Path) -> tuple[dict[str, TensorEntry], mmap.mmap]:
    """Check the header of one file, then map it."""
    _refuse_special(path)
    with path.open("rb") as file:
        entries = _read_header(path, file)
        # Copy on write instead of read-only: torch warns about read-only buffers. Pages that are only
        # read stay in the page cache and cost no memory of the process's own.
        return entries, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _read_header(path: Path, file: BinaryIO) -> dict[str, TensorEntry]:
    file_bytes = os.fstat(file.fileno()).st_size
    start = file.read(len(_GIT_LFS))
    _refuse_git_lfs(path, start)
    if len(start) < 8:
        raise CheckpointError(f"{path} is cut off: {file_bytes} bytes, not even a header size; {_AGAIN}")
    header_bytes = int.from_bytes(start[:8], "little")
    if not 2 <= header_bytes <= MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} claims a header of {header_bytes} bytes (2 to {MAX_HEADER_BYTES} are possible), "
            f"so it is damaged or not a safetensors file; {_AGAIN}"
        )
    data_start = 8 + header_bytes
    if data_start > file_bytes:
        raise CheckpointError(
            f"{path} is cut off: {file_bytes} bytes, the header alone ends at {data_start}; {_AGAIN}"
        )
    file.seek(8)
    text = file.read(header_bytes)
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path}: the header does not start with an object; {_AGAIN}")
    header = _parse_json(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: `__metadata__` does not map text to text; {_AGAIN}")
    entries = {name: _entry(path, name, raw, data_start) for name, raw in header.items()}
    _check_spans(path, entries, data_start, file_bytes)
    return entries


def _entry(path: Path, name: str, raw: Any, data_start: int) -> TensorEntry:
    """Check that one tensor's header is consistent."""

    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {shorten(name)} {problem}; {_AGAIN}")

    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise fail(f"is described by {shorten(raw)}, not by dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise fail(f"has the unknown dtype {shorten(dtype)}")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(_is_size(size) for size in shape):
        raise fail(f"has the shape {shorten(shape)}, not up to {_MAX_RANK} sizes from 0 to 2**63 - 1")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(size) for size in offsets):
        raise fail(f"has the data_offsets {shorten(offsets)}, not two offsets from 0 to 2**63 - 1")
    bits = _DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    begin, end = offsets
    if begin > end or bits % 8 or bits // 8 != end - begin:
        raise fail(f"spans bytes {begin} to {end}, but {dtype} of shape {shape} takes {bits} bits")
    if dtype in _READABLE and (data_start + begin) % (_DTYPE_BITS[dtype] // 8):
        raise fail(f"starts at byte {data_start + begin}, which is no multiple of the size of {dtype}")
    return TensorEntry(path, dtype, tuple(shape), data_start + begin, end - begin)


def _check_spans(path: Path, entries: dict[str, TensorEntry], data_start: int, file_bytes: int) -> None:
    """The tensors must fill the rest of the file, in some order, with no gap, overlap or trailing byte."""
    expected = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size_bytes)):
        if entry.offset + entry.size_bytes > file_bytes:
            raise CheckpointError(
                f"{path}: tensor {shorten(name)} ends at {entry.offset + entry.size_bytes}, but the file "
                f"is {file_bytes} bytes long: it is cut off; {_AGAIN}"
            )
        if entry.offset != expected:
            kind = "overlaps the tensor before it" if entry.offset < expected else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {shorten(name)} {kind} (byte {entry.offset}, not {expected}); {_AGAIN}"
            )
        expected += entry.size_bytes
    if expected != file_bytes:
        raise CheckpointError(
            f"{path}: the tensors end at byte {expected}, but the file has {file_bytes} bytes; {_AGAIN}"
        )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _read_json(path: Path) -> Any:
    _refuse_special(path)
    with path.open("rb") as file:
        text = file.read(_MAX_JSON_BYTES + 1)
    if len(text) > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is longer than {_MAX_JSON_BYTES} bytes; {_AGAIN}")
    _refuse_git_lfs(path, text)
    return _parse_json(path, text)


def stop_ids(folder: Path) -> frozenset[int]:
    """The ids that end what a language model generates, from generation_config.json or else config.json. Raises
    CheckpointError when neither has any."""
    for file in (folder / "generation_config.json", folder / "config.json"):
        raw = _read_json(file) if file.exists() else {}
        ids = raw.get("eos_token_id") if isinstance(raw, Mapping) else None
        ids = ids if isinstance(ids, list) else [ids]
        if ids and all(_is_size(token_id) for token_id in ids):
            return frozenset(ids)
        if ids != [None]:
            raise CheckpointError(
                f"{file}: `eos_token_id` is {shorten(ids)}, not a token id or a list of them; {_AGAIN}"
            )
    raise CheckpointError(f"{folder / 'config.json'}: `eos_token_id` is missing; {_AGAIN}")


def _parse_json(path: Path, text: bytes) -> Any:
    """Parse strictly: UTF-8, no repeated key, no NaN."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {shorten(key)} appears twice")
            found[key] = value
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); {_AGAIN}") from error


def _refuse_special(path: Path) -> None:
    # Before opening: opening a pipe would wait for a writer for ever.
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file; {_AGAIN}")


def _refuse_git_lfs(path: Path, start: bytes) -> None:
    if start.startswith(_GIT_LFS):
        raise CheckpointError(
            f"{path} is a git-LFS pointer, not the file itself; run `git lfs pull` in the checkpoint's folder"
        )


def shorten(value: Any) -> str:
    """Quote a value from a file: escaped, and short enough for a message."""
    text = value if isinstance(value, str) and value.isascii() and value.isprintable() else repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
