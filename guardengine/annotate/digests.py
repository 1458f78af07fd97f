"""Digests of the files that an annotation depends on: those of the input and of the checkpoint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from guardengine.errors import CheckpointError, ConfigError

# The files in a checkpoint's folder that its answers depend on.
_CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.jinja")
_CHUNK = 1 << 22


def checkpoint_digest(folder: Path, *, progress: bool = False) -> str:
    """The sha256 over names and contents of the weights, configuration, tokenizer and templates. Raises
    CheckpointError."""
    files = sorted({file for pattern in _CHECKPOINT_FILES for file in folder.glob(pattern)})
    try:
        return files_digest(files, folder, "checkpoint" if progress else None)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error


def input_digest(files: Sequence[Path], root: Path, *, progress: bool = False) -> str:
    """The sha256 over names (relative to `root`) and contents of the input's files. Raises ConfigError."""
    try:
        return files_digest(files, root, "input" if progress else None)
    except OSError as error:
        raise ConfigError(f"{root}: cannot be read ({error})") from error


def files_digest(files: Sequence[Path], root: Path, shown_as: str | None) -> str:
    """The sha256 over lines with the digest of a file and its name. Shows a progress bar after some seconds, unless
    `shown_as` is None."""
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


class Watched:
    """The input's files, which must not change while they are annotated."""

    def __init__(self, given: Path, files: Sequence[Path]) -> None:
        """Remember the state of the files. given: the path as the user wrote it. Raises ConfigError when they cannot
        be read."""
        self._given, self._files = given, files
        self._before = self._identities()

    def check(self) -> None:
        """Raise ConfigError when a file was written to, replaced or removed since."""
        if self._identities() != self._before:
            raise ConfigError(
                f"{self._given} was changed while it was annotated; give --restart to annotate its present content"
            )

    def _identities(self) -> list[tuple[int, int, int]]:
        try:
            return [
                (status.st_ino, status.st_size, status.st_mtime_ns) for status in map(os.stat, self._files)
            ]
        except OSError as error:
            raise ConfigError(f"{self._given} cannot be read ({error})") from error
