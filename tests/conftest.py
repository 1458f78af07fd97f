"""Shared by the suite: options for other builds of the native code, and tiny checkpoints, made once a session."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from annotating import Files
from feeding import VOCAB
from guarding import make_bombs_unsafe

from guardengine import Engine
from guardengine.checkpoint.random_weights import make_checkpoint
from guardengine.kernels import library, native
from guardengine.text.tokenizer import Tokenizer

torch.set_num_threads(1)  # tiny tensors: a second thread only costs


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("guardengine")
    group.addoption(
        "--native-library",
        type=Path,
        metavar="PATH",
        help="another build of csrc/ to test, made by tests/native/Makefile",
    )
    group.addoption(
        "--isa",
        choices=native.ISAS,
        help="test this instruction set only: as the one that engines run, and of tests that take one each",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module is imported: some of them ask the library what it has.
    if path := config.getoption("--native-library"):
        library.path = path.resolve()
    if isa := config.getoption("--isa"):
        os.environ["GUARDENGINE_ISA"] = isa


def pytest_report_header(config: pytest.Config) -> list[str]:
    if config.getoption("--native-library") is None:
        return []
    loaded = native.library()
    lines = [f"native library: {library.path} with {', '.join(native.usable_isas())}"]
    if hasattr(loaded, "ge_emulated_isas"):
        loaded.ge_emulated_isas.restype = ctypes.c_char_p
        lines.append(f"native library: {loaded.ge_emulated_isas().decode()} emulated")
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--isa")
    others = [item for item in items if wanted and callspec_isa(item) not in (None, wanted)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


# What the machine that decides cannot have; everything else it installs, see .ci/run.
ALLOWED_SKIPS = ("needs real weights", "needs a GPU")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With CI set, a test that skips for want of something that could be installed fails the run."""
    if os.environ.get("CI") and forbidden_skips(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if os.environ.get("CI") and (forbidden := forbidden_skips(config)):
        terminalreporter.section("skips that fail the run where CI is set", red=True)
        for line in forbidden:
            terminalreporter.line(line)


def forbidden_skips(config: pytest.Config) -> list[str]:
    """A line for each test that was skipped, but for ALLOWED_SKIPS."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a worker, whose reports go to the process that started it
        return []
    found = []
    for report in reporter.stats.get("skipped", ()):
        _, _, reason = report.longrepr
        if not reason.removeprefix("Skipped: ").startswith(ALLOWED_SKIPS):
            found.append(f"{report.nodeid}: {reason}")
    return found


def callspec_isa(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("isa") if callspec else None


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoints(preset, **overrides) -> folder; each combination is written once a session."""
    made: dict[str, Path] = {}

    def get(preset: str = "stream-tiny", **overrides: Any) -> Path:
        key = repr((preset, sorted(overrides.items())))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / preset, preset, **overrides)
        return made[key]

    return get


@pytest.fixture(scope="session")
def folder(checkpoints: Callable[..., Path]) -> Path:
    """A tiny Stream checkpoint in float32 that reads text."""
    return checkpoints(dtype="float32")


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    """That of `folder`."""
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="session")
def checkpoint(checkpoints: Callable[..., Path]) -> Path:
    """A tiny Stream checkpoint in bfloat16, as it is released, that reads text."""
    return checkpoints()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Data sets to annotate, as JSON lines."""
    return Files(tmp_path)


@pytest.fixture(params=[".jsonl", ".parquet"])
def either(tmp_path: Path, request: pytest.FixtureRequest) -> Files:
    """The same in each format."""
    return Files(tmp_path, request.param)


@pytest.fixture
def bombs_are_unsafe(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    """See guarding.make_bombs_unsafe."""
    make_bombs_unsafe(monkeypatch, tokenizer)


@pytest.fixture(scope="module")
def upstream() -> Any:
    """A scripted LLM's server, see proxying.Upstream."""
    from proxying import Upstream  # with a web framework, which most tests do without

    upstream = Upstream()
    yield upstream
    upstream.stop()


@pytest.fixture(scope="session")
def tiny(checkpoints: Callable[..., Path]) -> Path:
    """A tiny Stream checkpoint in float32 with a small vocabulary and no use for text."""
    return checkpoints(vocab_size=VOCAB, dtype="float32")


@pytest.fixture
def engine(tiny: Path) -> Any:
    with Engine.from_pretrained(tiny, kv_cache_bytes=2**22, max_model_len=512, block_size=4) as engine:
        yield engine
        engine.check_integrity()
