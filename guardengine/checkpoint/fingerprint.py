"""Fingerprint: which weights an engine runs, and in which arithmetic. Labels of equal fingerprints belong together.

The digest is that of the files as they lie in the folder, so anybody can compute it:

    cd CHECKPOINT && sha256sum config.json model*.safetensors | sha256sum

config.json counts because it names the classes and says how the weights are used. Knows no tensors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from guardengine.errors import CheckpointError


class Numerics(NamedTuple):
    """What is rounded, and to what. Two engines that differ here give other logits for the same weights."""

    dtype: str
    quantization: str | None
    kv_dtype: str


class Fingerprint:
    """The files that an engine was loaded from, and its arithmetic."""

    def __init__(self, files: Iterable[Path], numerics: Numerics) -> None:
        self.numerics = numerics
        self._files = {path: _identity(path) for path in sorted(files)}
        self._weights: str | None = None

    def weights(self) -> str:
        """sha256 over config.json and the safetensors files, in hex. Reads all of them, once.

        A sample of the bytes would be cheaper, but would not notice that one layer was exchanged.
        Raises CheckpointError when a file is not the one any more that the engine was loaded from.
        """
        if self._weights is None:
            lines = []
            for path, identity in self._files.items():
                try:
                    with path.open("rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                    is_same = _identity(path) == identity
                except OSError as error:
                    raise CheckpointError(
                        f"{path} cannot be read again ({error}); load the engine anew"
                    ) from error
                if not is_same:
                    raise CheckpointError(
                        f"{path} has changed since the engine was loaded from it; load the engine anew"
                    )
                lines.append(f"{digest}  {path.name}\n")
            self._weights = hashlib.sha256("".join(lines).encode()).hexdigest()
        return self._weights


def _identity(path: Path) -> tuple[int, ...]:
    """What a file is known by while nobody writes to it or puts another in its place."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
