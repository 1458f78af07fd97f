"""resolve_checkpoint: folders, pinned revisions, and plain words when the hub cannot deliver. No network."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from guardengine.checkpoint.hub import ALLOW_PATTERNS, PINNED_REVISIONS, resolve_checkpoint
from guardengine.errors import CheckpointError

STREAM = "Qwen/Qwen3Guard-Stream-0.6B"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Stands for the hub: records what is asked, delivers one folder or raises."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refusal: Exception | None = None
        self.calls: list[dict[str, Any]] = []

    def model_info(self, api: Any, name: str, **options: Any) -> None:
        if self.refusal is not None:
            raise self.refusal

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.calls.append({"name": name, **options})
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    folder = tmp_path / "delivered"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    fake = FakeHub(folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: fake.model_info(*a, **k))
    return fake


def snapshot(tmp_path: Path, commit: str, files: dict[str, str]) -> Path:
    folder = tmp_path / "cache" / "models--Qwen--Qwen3Guard-Stream-0.6B" / "snapshots" / commit
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("spelling", [str, Path])
def test_existing_folder_wins(hub: FakeHub, tmp_path: Path, spelling: Any) -> None:
    (tmp_path / "Qwen" / "Qwen3Guard-Stream-0.6B").mkdir(parents=True)
    assert resolve_checkpoint(spelling(STREAM)) == Path(STREAM)
    assert resolve_checkpoint(spelling(tmp_path)) == tmp_path
    assert not hub.calls


def test_home_is_expanded(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_checkpoint("~/delivered") == tmp_path / "delivered"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "./nowhere",
            "../nowhere",
            "/no/where",
            "~/nowhere",
            "~nobody/x",
            "no/such/folder",
            "nowhere",
            "a b/c",
        ),
        *("x" * 5000, "../../etc/passwd/x", "a/..", "-/-", "a/b\n", "\0", Path(STREAM)),
    ],
)
def test_path_that_does_not_exist_is_not_taken_for_an_id(hub: FakeHub, name: str | Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_checkpoint(name)
    assert not hub.calls


def test_file_and_empty_name_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is a file; give the folder"):
        resolve_checkpoint(tmp_path / "delivered" / "config.json")
    with pytest.raises(CheckpointError, match="empty"):
        resolve_checkpoint("")


@pytest.mark.parametrize("name", PINNED_REVISIONS)
def test_known_ids_are_pinned_and_only_data_files_are_wanted(hub: FakeHub, name: str) -> None:
    assert resolve_checkpoint(name) == hub.folder
    (call,) = hub.calls
    assert call["name"] == name
    assert call["revision"] == PINNED_REVISIONS[name]
    assert call["allow_patterns"] == list(ALLOW_PATTERNS)
    assert not [pattern for pattern in ALLOW_PATTERNS if pattern.endswith((".py", ".bin", ".pt", "*"))]


def test_pins_are_full_commits() -> None:
    assert PINNED_REVISIONS[STREAM] == "419364a715de9840d47b1457982f64ff37f90ed4"
    assert PINNED_REVISIONS["Qwen/Qwen3Guard-Stream-4B"] == "27a8f4e52e66dc01a03d20f41e362bb9c9bda7bf"


def test_revision_overrides_the_pin(hub: FakeHub) -> None:
    resolve_checkpoint(STREAM, COMMIT)
    assert hub.calls[0]["revision"] == COMMIT


def test_unknown_id_needs_a_revision(hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match=r"Qwen3Guard-Gen-0\.6B: .*revision=.*40-digit"):
        resolve_checkpoint("Qwen/Qwen3Guard-Gen-0.6B")
    assert not hub.calls
    assert resolve_checkpoint("Qwen/Qwen3Guard-Gen-0.6B", COMMIT) == hub.folder


@pytest.mark.parametrize(
    "revision", ["main", "v1.0", COMMIT[:39], COMMIT.upper(), COMMIT + "0", COMMIT + "\n"]
)
def test_revision_that_can_move_is_refused(hub: FakeHub, revision: str) -> None:
    with pytest.raises(CheckpointError, match="give the full commit"):
        resolve_checkpoint(STREAM, revision)
    assert not hub.calls


COMPLETE = dict.fromkeys(
    ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"), "{}"
)
SHARDED = {
    **dict.fromkeys(("config.json", "tokenizer.json", "tokenizer_config.json"), "{}"),
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}),
    "1.safetensors": "",
    "2.safetensors": "",
}


@pytest.mark.parametrize("files", [COMPLETE, SHARDED])
def test_complete_copy_in_the_cache_needs_no_hub(hub: FakeHub, tmp_path: Path, files: dict[str, str]) -> None:
    folder = snapshot(tmp_path, PINNED_REVISIONS[STREAM], files)
    hub.refusal = OSError("the hub was asked")
    assert resolve_checkpoint(STREAM) == folder
    assert not hub.calls


@pytest.mark.parametrize(
    ("files", "lost"), [(COMPLETE, name) for name in COMPLETE] + [(SHARDED, "2.safetensors")]
)
def test_partial_copy_in_the_cache_is_completed(
    hub: FakeHub, tmp_path: Path, files: dict[str, str], lost: str
) -> None:
    snapshot(tmp_path, PINNED_REVISIONS[STREAM], {name: text for name, text in files.items() if name != lost})
    assert resolve_checkpoint(STREAM) == hub.folder
    assert hub.calls


def made(kind: type[Exception], message: str = "told by the hub", **attributes: Any) -> Exception:
    """An error of the hub's library: its constructors differ between versions."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (made(errors.OfflineModeIsEnabled), ["HF_HUB_OFFLINE", "download the folder on a connected machine"]),
        (made(errors.GatedRepoError), ["gated", "hf auth login"]),
        (made(errors.RepositoryNotFoundError), ["knows no such id", "check the id"]),
        (made(errors.RevisionNotFoundError), ["no such commit", "revision="]),
        (made(errors.HfHubHTTPError, response=SimpleNamespace(status_code=503)), ["503", "try again later"]),
        (made(errors.LocalEntryNotFoundError), ["offline", "download the folder on a connected machine"]),
        (ConnectionResetError(errno.ECONNRESET, "reset"), ["offline", "give its path"]),
        (TimeoutError("too slow"), ["offline", "too slow"]),
        (OSError(errno.ENOSPC, "disk is full"), ["cannot be stored", "disk is full", "HF_HUB_CACHE"]),
    ],
)
def test_refusal_of_the_hub_is_told_plainly(
    hub: FakeHub, tmp_path: Path, refusal: Exception, words: list[str]
) -> None:
    hub.refusal = refusal
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(STREAM)
    for word in [STREAM, PINNED_REVISIONS[STREAM], str(tmp_path / "cache"), *words]:
        assert word in str(caught.value)
    assert caught.value.__cause__ is refusal


def test_repository_without_a_config_is_refused(hub: FakeHub) -> None:
    (hub.folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_checkpoint(STREAM)


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_it_fails_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    """The real library, told to be offline or pointed at a closed port of this machine."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE" if offline else "this machine is offline"):
        resolve_checkpoint(STREAM)
    assert time.monotonic() - start < 10
