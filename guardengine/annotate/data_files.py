"""The data files of a data-set folder: one that `datasets.save_to_disk` wrote, or a snapshot of the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from guardengine.errors import ConfigError

SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".arrow")
# Words in a file's path by which the datasets library recognizes splits.
_SPLITS = {
    "train": "train",
    "training": "train",
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def data_files(path: Path, split: str | None) -> list[Path]:
    """The files with the rows of a data set, in order, all of one suffix.

    Args:
        path: A file, or the folder of a data set.
        split: The split to read, where a folder has several.

    Raises:
        ConfigError: There is no such file, or it is not clear which files are meant.
    """
    if path.is_dir():
        files = _folder_files(path, split)
    elif split is not None:
        raise ConfigError(f"--split {split}: {path} is not a folder; leave --split out")
    elif path.is_file():
        files = [path]
    else:
        raise ConfigError(f"{path}: no such file or folder")
    suffixes = sorted({_suffix(file) for file in files})
    if not files or not set(suffixes) <= {*SUFFIXES}:
        what = f"ends in {', '.join(suffixes) or 'nothing'}" if path.is_file() else "holds no data files"
        raise ConfigError(f"{path} {what}; files that end in {', '.join(SUFFIXES)} are read")
    if len(suffixes) > 1:
        raise ConfigError(
            f"{path} holds files of several formats ({', '.join(suffixes)}); give one of its files or subfolders"
        )
    return files


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        names = _read_json(folder / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{folder / 'dataset_dict.json'}: `splits` is not a list of names")
        return _saved_files(folder / _choose(folder, split, names))
    if (folder / "state.json").is_file():
        if split is not None:
            raise ConfigError(f"--split {split}: {folder} is one split already; leave --split out")
        return _saved_files(folder)
    found = sorted(
        file
        for file in folder.rglob("*")
        if _suffix(file) in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    splits = {file: _split_of(file.relative_to(folder)) for file in found}
    names = sorted({name or "" for name in splits.values()})
    if names in ([], [""]) and split is None:
        return _of_one_folder(folder, found)
    chosen = _choose(folder, split, names)
    return _of_one_folder(folder, [file for file in found if splits[file] == (chosen or None)])


def _choose(folder: Path, split: str | None, names: list[str]) -> str:
    shown = ", ".join(name or "(files of no split)" for name in names) or "none"
    if split is None:
        if len(names) != 1:
            raise ConfigError(f"{folder} has several splits ({shown}); choose one with --split")
        return names[0]
    if split not in names:
        raise ConfigError(f"--split {split}: {folder} has no such split; it has {shown}")
    return split


def _of_one_folder(folder: Path, files: list[Path]) -> list[Path]:
    """Refuse files of several configurations of a data set, which are in different subfolders."""
    parents = sorted({file.parent for file in files})
    if len(parents) > 1:
        shown = ", ".join(str(parent.relative_to(folder)) for parent in parents[:10])
        raise ConfigError(f"{folder} has data files in several folders ({shown}); give one of them as IN")
    return files


def _saved_files(folder: Path) -> list[Path]:
    """The files that state.json names. Other files in the folder are caches."""
    state = _read_json(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise ConfigError(
            f"{folder} selects rows by an indices file, as old releases of datasets wrote; save it again with a newer "
            "one, or as Parquet"
        )
    entries = state.get("_data_files")
    try:
        names = [entry["filename"] for entry in entries or []]
        files = [folder / Path(name).name for name in names]
    except (TypeError, KeyError):
        raise ConfigError(f"{folder / 'state.json'}: `_data_files` is not a list of file names") from None
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file}: no such file, but {folder / 'state.json'} names it")
    return files


def _split_of(path: Path) -> str | None:
    """The split that a path names: the last of its words that is the name of a split."""
    words = re.split(r"[^a-z]+", str(path.with_suffix("")).lower())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), None)


def _suffix(file: Path) -> str:
    return file.suffix.lower()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: not a JSON object")
    return value
