"""Digests of what an annotation comes from: the input's files and the checkpoint's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from guardengine.errors import CheckpointError, ConfigError

# Everything in a checkpoint's folder that answers depend on.
_CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja")
_CHUNK = 1 << 22


def checkpoint_digest(folder: Path, *, progress: bool = False) -> str:
    """sha256 over names and contents of the weights, configuration, tokenizer and templates. Raises CheckpointError."""
    files = sorted({file for pattern in _CHECKPOINT_FILES for file in folder.glob(pattern)})
    try:
        return files_digest(files, folder, "checkpoint" if progress else None)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error


def input_digest(files: Sequence[Path], root: Path, *, progress: bool = False) -> str:
    """sha256 over names (below `root`) and contents of the input's files. Raises ConfigError."""
    try:
        return files_digest(files, root, "input" if progress else None)
    except OSError as error:
        raise ConfigError(f"{root}: cannot be read ({error})") from error


def files_digest(files: Sequence[Path], root: Path, shown_as: str | None) -> str:
    """sha256 over lines of a file's digest and its name. Shown with progress where it takes longer than seconds."""
    lines = []
    with tqdm(
        total=sum(file.stat().st_size for file in files),
        desc=f"digest of the {shown_as}",
        unit="B",
        unit_scale=True,
        delay=3,
        leave=False,
        disable=shown_as is None,
    ) as bar:
        for path in files:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    bar.update(len(chunk))
            lines.append(f"{digest.hexdigest()}  {os.path.relpath(path, root)}\n")
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def identities(files: Sequence[Path]) -> list[tuple[int, int, int]]:
    """What files are known by while nobody writes to them: inode, size, time. Raises ConfigError."""
    try:
        return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in map(os.stat, files)]
    except OSError as error:
        raise ConfigError(f"the input cannot be read any more ({error})") from error
