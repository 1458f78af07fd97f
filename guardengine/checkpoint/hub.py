"""resolve_checkpoint(): from a folder or a Hugging Face id to a folder on this machine.

Downloads data files only, at one pinned commit, into Hugging Face's own cache. Never runs or downloads code.
"""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

from guardengine.errors import CheckpointError

# The commits for which this engine is written, so that an id always means the same bytes.
PINNED_REVISIONS = {
    "Qwen/Qwen3Guard-Stream-0.6B": "419364a715de9840d47b1457982f64ff37f90ed4",
    "Qwen/Qwen3Guard-Stream-4B": "27a8f4e52e66dc01a03d20f41e362bb9c9bda7bf",
}
ALLOW_PATTERNS = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_TIMEOUT_S = 5.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_checkpoint(path_or_id: str | Path, revision: str | None = None) -> Path:
    """Find the folder of a checkpoint. When a hub id is given and the cache does not have it, download it first.

    Args:
        path_or_id: An existing folder, which takes precedence, or a hub id `org/name`.
        revision: The full commit for a hub id; may be left out for the ids in PINNED_REVISIONS. Not used for a folder.

    Raises:
        CheckpointError: There is no such folder, no commit is known, or the hub cannot deliver.
    """
    name = str(path_or_id)
    if not name:
        raise CheckpointError("the checkpoint's name is empty; give a folder or a hub id such as org/name")
    # os.path answers False where Path raises: no such user's home, names that are too long.
    path = Path(os.path.expanduser(path_or_id))
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise CheckpointError(f"{path} is a file; give the folder that contains it")
    is_path = isinstance(path_or_id, Path) or name.startswith((".", "/", "~"))
    if is_path or not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{name}: no such folder ({path.absolute()}); check the path, or give a hub id as org/name"
        )
    commit = revision or PINNED_REVISIONS.get(name)
    if commit is None:
        raise CheckpointError(
            f"{name}: no such folder is here, and as a hub id it needs a pinned revision; give revision= the "
            f"full 40-digit commit, as shown at https://huggingface.co/{name}/commits/main"
        )
    if not _COMMIT.fullmatch(commit):
        raise CheckpointError(
            f"{name}: revision={commit!r} may mean other files later; give the full commit: 40 digits 0-9a-f"
        )
    return _download(name, commit)


def _download(name: str, commit: str) -> Path:
    # Slow to import, and not needed by those who give a folder.
    import huggingface_hub
    from huggingface_hub import constants

    cache = Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)
    # A commit never changes, so for a complete copy the hub need not be asked.
    cached = cache / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    if _is_complete(cached):
        return cached
    try:
        # First a small request with a short timeout, because downloads retry for a long time.
        huggingface_hub.HfApi().model_info(name, revision=commit, timeout=_TIMEOUT_S)
        folder = Path(
            huggingface_hub.snapshot_download(
                name,
                revision=commit,
                cache_dir=cache,
                allow_patterns=list(ALLOW_PATTERNS),
                etag_timeout=_TIMEOUT_S,
            )
        )
    # Depending on its version it raises errors of two HTTP libraries, its own, and those of the operating system.
    except Exception as error:
        raise _explain(name, commit, cache, error) from error
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name} at {commit}: the repository has no config.json; check the hub id")
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether an earlier download has left everything that a checkpoint needs."""
    files = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files |= set(json.loads(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False
    else:
        files.add("model.safetensors")
    return all((folder / file).is_file() for file in files)


def _explain(name: str, commit: str, cache: Path, error: Exception) -> CheckpointError:
    """The error that says what stopped a download, and what to do."""
    from huggingface_hub import errors

    start = f"{name} at {commit} is not complete in the cache {cache}, and"
    mend = "download the folder on a connected machine, copy it here and give its path"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return CheckpointError(f"{start} HF_HUB_OFFLINE forbids a download; unset it, or {mend}")
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{start} it is gated; accept its terms on huggingface.co and run `hf auth login`, or {mend}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{start} the hub has no such commit; give a commit of {name} as revision=")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{start} the hub knows no such id (if it is private: run `hf auth login`); check the id"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return CheckpointError(f"{start} the hub answered {status}; try again later, or {mend}")
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return CheckpointError(f"{start} it cannot be stored there ({error}); make room, or set HF_HUB_CACHE")
    reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return CheckpointError(f"{start} this machine is offline or the hub is out of reach ({reason}); {mend}")
