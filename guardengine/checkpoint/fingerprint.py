"""Fingerprint: the weights that an engine runs, and its arithmetic. Labels with equal fingerprints can be compared.

The digest is over the files in the folder, so that anybody can compute it:

    cd CHECKPOINT && sha256sum config.json model*.safetensors | sha256sum

config.json is included because it names the classes and says how the weights are used. Knows no tensors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from guardengine.errors import CheckpointError


class Numerics(NamedTuple):
    """The precision of an engine. Two engines that differ here compute different logits from the same weights.

    Attributes:
        dtype: The dtype of the activations.
        quantization: The quantization of the weights, or None.
        kv_dtype: The dtype of the KV cache.
    """

    dtype: str
    quantization: str | None
    kv_dtype: str


class Fingerprint:
    """The files from which an engine was loaded, and its arithmetic."""

    def __init__(self, files: Iterable[Path], numerics: Numerics) -> None:
        self.numerics = numerics
        self._files = {path: _identity(path) for path in sorted(files)}
        self._weights: str | None = None

    def weights(self) -> str:
        """The sha256 over config.json and the safetensors files, in hex. All of them are read, once.

        Reading only a sample would be faster, but would not notice that one layer was exchanged.

        Raises:
            CheckpointError: A file has changed since the engine was loaded.
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
    """Device, inode, size and time of a file, which change when it is written or replaced."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
