"""Checkpoints: views on the mapped files, and everything that is damaged is refused by name."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as parse
from safetensors.torch import save_file

from guardengine.checkpoint.files import open_checkpoint
from guardengine.checkpoint.random_weights import make_checkpoint
from guardengine.errors import CheckpointError

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 24, "vocab_size": 40}


def make(folder: Path, **options: Any) -> Path:
    return make_checkpoint(folder, "stream-tiny", guard_inner_size=8, **SMALL, **options)


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    return make(tmp_path / "stream")


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Read a file with the safetensors library: from bytes, as views on it would follow its changes."""
    return parse(path.read_bytes())


def test_views_are_the_mapped_file_and_outlive_it(stream: Path) -> None:
    name, path = "model.norm.weight", stream / "model.safetensors"
    expected = stored(path)[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_checkpoint(stream) as checkpoint:
            view, second = checkpoint.tensor(name, (16,)), checkpoint.tensor(name, (16,))
    assert view.data_ptr() == second.data_ptr()  # both are the mapping: no copy was made
    path.unlink()
    assert torch.equal(view, expected)


def test_writing_to_a_view_never_reaches_the_file(stream: Path) -> None:
    before = (stream / "model.safetensors").read_bytes()
    with open_checkpoint(stream) as checkpoint:
        checkpoint.tensor("model.norm.weight", (16,)).fill_(3)
    assert (stream / "model.safetensors").read_bytes() == before


def test_closed_checkpoint_gives_no_tensors(stream: Path) -> None:
    checkpoint = open_checkpoint(stream)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*open it again"):
        checkpoint.tensor("model.norm.weight", (16,))


def test_shards_may_be_links_into_a_cache(tmp_path: Path) -> None:
    folder = make(tmp_path / "snapshot", max_shard_bytes=4000)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensor("model.norm.weight", (16,)).shape == (16,)


# What must be refused: damaged files


def safetensors(header: Any, data: bytes = b"", claimed: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text + data


def one(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def two(begin: int, end: int) -> dict[str, Any]:
    return one() | {"b": {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}}


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "cut off"),
    "shorter than a header size": (b"1234567", "cut off"),
    "header of zero bytes": (safetensors(b"", b"", 0), "header of 0 bytes"),
    "header claims 2 GB": (safetensors(one(), bytes(8), 2 * 2**30), "2147483648"),
    "header claims 2**64 - 1": (safetensors(one(), bytes(8), 2**64 - 1), "18446744073709551615"),
    "header just over the limit": (safetensors(one(), bytes(8), 100_000_001), "100000001"),
    "header longer than the file": (safetensors(one(), b"", 4096), "the header alone ends at"),
    "not UTF-8": (safetensors(b'{"\xff": 1}'), "JSON"),
    "UTF-16": (safetensors("{}".encode("utf-16")), "does not start with an object"),
    "not JSON": (safetensors(b'{"a": }'), "JSON"),
    "two JSON values": (safetensors(b"{} {}"), "JSON"),
    "a list": (safetensors([]), "does not start with an object"),
    "leading space": (safetensors(b" {}"), "does not start with an object"),
    "NaN": (safetensors(b'{"a": NaN}'), "NaN"),
    "nested too deeply": (safetensors(b'{"a":' * 100_000), "JSON"),
    "number with too many digits": (safetensors(b'{"a": ' + b"9" * 5000 + b"}"), "JSON"),
    "tensor twice": (safetensors(b'{"a": {}, "a": {}}'), "appears twice"),
    "key twice": (
        safetensors(
            b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)
        ),
        "appears twice",
    ),
    "metadata is no object": (safetensors({"__metadata__": 1}), "__metadata__"),
    "metadata of numbers": (safetensors({"__metadata__": {"a": 1}}), "__metadata__"),
    "tensor is no object": (safetensors({"a": [1]}), "tensor a"),
    "no dtype": (safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "tensor a"),
    "unknown key": (safetensors(one(device="cuda"), bytes(8)), "tensor a"),
    "unknown dtype": (safetensors(one(dtype="F128"), bytes(8)), "F128"),
    "dtype is a number": (safetensors(one(dtype=32), bytes(8)), "unknown dtype"),
    "dtype is a list": (safetensors(one(dtype=["F32"]), bytes(8)), "unknown dtype"),
    "shape is a number": (safetensors(one(shape=2), bytes(8)), "shape 2"),
    "negative size": (safetensors(one(shape=[-2]), bytes(8)), "[-2]"),
    "two negative sizes": (safetensors(one(shape=[-2, -1]), bytes(8)), "[-2, -1]"),
    "size is a float": (safetensors(one(shape=[2.0]), bytes(8)), "[2.0]"),
    "size is a boolean": (safetensors(one(shape=[True, 2]), bytes(8)), "[True, 2]"),
    "size overflows": (safetensors(one(shape=[2**63]), bytes(8)), "9223372036854775808"),
    "product overflows to the span": (safetensors(one(shape=[2**62 + 2]), bytes(8)), "bits"),
    "too many dimensions": (safetensors(one(shape=[1] * 17), bytes(4)), "16 sizes"),
    "offsets are no pair": (safetensors(one(data_offsets=[0, 4, 8]), bytes(8)), "data_offsets"),
    "offset is negative": (safetensors(one(data_offsets=[-8, 0]), bytes(8)), "[-8, 0]"),
    "offsets are text": (safetensors(one(data_offsets=["0", "8"]), bytes(8)), "data_offsets"),
    "offsets are reversed": (safetensors(one(data_offsets=[8, 0]), bytes(8)), "bytes 8 to 0"),
    "span too short": (safetensors(one(data_offsets=[0, 4]), bytes(4)), "64 bits"),
    "span too long": (safetensors(one(data_offsets=[0, 12]), bytes(12)), "64 bits"),
    "span of half bytes": (safetensors(one(dtype="F4", shape=[3], data_offsets=[0, 1]), bytes(1)), "12 bits"),
    "past the end of the file": (safetensors(one(), bytes(7)), "cut off"),
    "data missing": (safetensors(one()), "cut off"),
    "overlap": (safetensors(two(4, 12), bytes(12)), "tensor b overlaps"),
    "same bytes twice": (safetensors(two(0, 8), bytes(8)), "overlaps"),
    "gap": (safetensors(two(12, 20), bytes(20)), "tensor b leaves a gap"),
    "gap at the start": (safetensors(one(data_offsets=[8, 16]), bytes(16)), "tensor a leaves a gap"),
    "trailing bytes": (safetensors(one(), bytes(9)), "but the file has"),
    "trailing bytes after nothing": (safetensors({}, bytes(8)), "but the file has"),
    "data not aligned": (
        (65).to_bytes(8, "little") + json.dumps(one()).encode().ljust(65) + bytes(8),
        "no multiple of the size of F32",
    ),
    "tensor not aligned": (
        safetensors(
            {"c": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}} | one(data_offsets=[1, 9]), bytes(9)
        ),
        "tensor a starts at byte",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_safetensors_file_is_refused(stream: Path, damage: str) -> None:
    content, word = DAMAGED[damage]
    path = stream / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(stream)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert word in message
    assert message.endswith("; download the file again")
    assert len(message) < 1000


def test_every_cut_and_every_tail_is_refused(stream: Path) -> None:
    path = stream / "model.safetensors"
    content = path.read_bytes()
    for size in [*range(64), *range(64, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="download the file again"):
            open_checkpoint(stream)
    path.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match="but the file has"):
        open_checkpoint(stream)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_git_lfs_pointer_is_told_apart(stream: Path, file: str) -> None:
    (stream / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match=rf"{file} is a git-LFS pointer.*git lfs pull"):
        open_checkpoint(stream)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "JSON object"),
        (b"\xff\xfe", "JSON"),
        (b'{"a":1,"a":2}', "appears twice"),
        (b"[" * 100_000, "JSON"),
        (b'{"rope_theta": Infinity}', "Infinity"),
    ],
)
def test_damaged_config_is_refused(stream: Path, content: bytes, word: str) -> None:
    (stream / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{word}"):
        open_checkpoint(stream)


def test_missing_parts_are_named(stream: Path, tmp_path: Path) -> None:
    def refused(folder: Path, pattern: str) -> None:
        with pytest.raises(CheckpointError, match=pattern):
            open_checkpoint(folder)

    weights = stream / "model.safetensors"
    refused(tmp_path / "nowhere", "nowhere does not exist; give the folder")
    refused(weights, r"model\.safetensors is a file; give the folder")
    refused(Path("x" * 5000), "does not exist")
    weights.rename(stream / "model-00001-of-00002.safetensors")
    refused(stream, r"only model-00001-of-00002\.safetensors; download model\.safetensors\.index\.json")
    (stream / "model-00001-of-00002.safetensors").rename(stream / "pytorch_model.bin")
    refused(stream, r"only pytorch_model\.bin: pickle files are never read.*download the \*\.safetensors")
    (stream / "pytorch_model.bin").unlink()
    refused(stream, r"neither model\.safetensors nor .*; download")
    (stream / "config.json").unlink()
    refused(stream, r"config\.json is missing")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_pipes_and_folders_in_place_of_files_are_refused(stream: Path, file: str) -> None:
    (stream / file).unlink()
    os.mkfifo(stream / file)
    with pytest.raises(CheckpointError, match=f"{file} is not a regular file"):
        open_checkpoint(stream)
    (stream / file).unlink()
    (stream / file).mkdir()
    with pytest.raises(CheckpointError, match=f"{file} is not a regular file"):
        open_checkpoint(stream)


def test_unreadable_file_is_a_checkpoint_error(stream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(CheckpointError, match=r"Permission denied.*check its permissions"):
        open_checkpoint(stream)


def edit_index(folder: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m.clear(), ["weight_map"]),
        (lambda m: m.update({NORM: 1}), ["index.json", NORM]),
        (lambda m: m.update({NORM: "../stolen.safetensors"}), ["index.json", NORM, "../stolen.safetensors"]),
        (lambda m: m.update({NORM: "/etc/x.safetensors"}), ["index.json", NORM, "same folder"]),
        (lambda m: m.update({NORM: "a\\b.safetensors"}), ["index.json", NORM, "same folder"]),
        (lambda m: m.update({NORM: "a\0.safetensors"}), ["index.json", NORM, "same folder"]),
        (lambda m: m.update({NORM: ".."}), ["index.json", NORM, "same folder"]),
        (lambda m: m.update({NORM: "pytorch_model.bin"}), ["index.json", NORM, "*.safetensors"]),
        (lambda m: m.update({NORM: "gone.safetensors"}), ["gone.safetensors is missing", "missing files"]),
        (lambda m: m.update({NORM: m["model.embed_tokens.weight"]}), [NORM, "index.json says in"]),
        (lambda m: m.pop(NORM), [NORM, "index.json says in no file"]),
        (lambda m: m.update(ghost=m[NORM]), ["ghost", "not stored here"]),
    ],
)
def test_index_that_lies_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, str]], Any], words: list[str]
) -> None:
    folder = make(tmp_path / "sharded", max_shard_bytes=4000)
    edit_index(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    for word in [str(folder), *words, "; download"]:
        assert word in str(caught.value)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "sharded", max_shard_bytes=4000)
    first, *_, last = sorted(folder.glob("*.safetensors"))
    save_file(stored(last) | {"model.embed_tokens.weight": torch.zeros(40, 16)}, last)
    with pytest.raises(
        CheckpointError, match=rf"{last.name}.*embed_tokens.*also stored in {first.name}.*download"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [b"{}", b"[]", b"not JSON", b'{"weight_map": []}', b"\xff"])
def test_damaged_index_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = make(tmp_path / "sharded", max_shard_bytes=4000)
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json.*download the file again"):
        open_checkpoint(folder)
