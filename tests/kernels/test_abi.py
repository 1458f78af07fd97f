"""A compiled library that does not fit this Python code is refused before anything in it is called."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from enum import IntEnum
from pathlib import Path

import pytest

from guardengine.errors import ConfigError
from guardengine.kernels import abi, library
from guardengine.runners.cores import load_library

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """This build under another name: a library is opened, and checked, once a process."""
    return Path(shutil.copy(library.path, tmp_path / "_C.so"))


def facts() -> str:
    """What this build says of itself."""
    return load_library().ge_abi().decode()


def compile_library(tmp_path: Path, source: str) -> Path:
    path = tmp_path / "_C.so"
    (tmp_path / "old.c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), str(tmp_path / "old.c")], check=True)
    return path


def library_that_says(tmp_path: Path, words: str) -> Path:
    return compile_library(tmp_path, f'const char* ge_abi(void) {{ return "{words}"; }}\n')


def test_this_build_is_accepted(copied: Path) -> None:
    assert load_library(copied).ge_isa().decode()


@pytest.mark.parametrize("name", ["GeModelConfig", "GeBatch", "GeCache"])
def test_struct_of_another_size_is_refused(name: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = abi._STRUCTS[name]

    class Longer(known):
        _fields_ = (("added", ctypes.c_int64),)

    monkeypatch.setitem(abi._STRUCTS, name, Longer)
    sizes = f"{name} is {ctypes.sizeof(known)} in the library, {ctypes.sizeof(known) + 8} in Python"
    with pytest.raises(ConfigError, match=rf"_C\.so cannot be used.*{sizes}.*pip install"):
        load_library(copied)


@pytest.mark.parametrize("name", ["GeDtype", "GeFormat", "GeMatrix", "GePeak", "GeStatus"])
def test_enum_of_another_length_is_refused(name: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {member.name: member.value for member in abi._ENUMS[name]} | {"ADDED": 99}
    monkeypatch.setitem(abi._ENUMS, name, IntEnum(name, members))
    with pytest.raises(
        ConfigError, match=f"{name} is {len(members) - 1} in the library, {len(members)} in Python"
    ):
        load_library(copied)


@needs_compiler
def test_every_difference_is_named(tmp_path: Path) -> None:
    size = ctypes.sizeof(abi.BatchStruct)
    words = facts().replace(f"GeBatch={size}", "GeBatch=8").replace("kMaxInner=65536", "kMaxInner=131072")
    with pytest.raises(ConfigError) as refused:
        load_library(library_that_says(tmp_path, words))
    assert f"GeBatch is 8 in the library, {size} in Python" in str(refused.value)
    assert "kMaxInner is 131072 in the library, 65536 in Python" in str(refused.value)
    assert "GeModelConfig" not in str(refused.value)


@needs_compiler
def test_what_only_one_side_knows_is_a_difference(tmp_path: Path) -> None:
    words = facts().replace("GeCache=", "GeNewStruct=")
    with pytest.raises(ConfigError, match="GeCache is unknown in the library") as refused:
        load_library(library_that_says(tmp_path, words))
    assert f"GeNewStruct is {ctypes.sizeof(abi.CacheStruct)} in the library, unknown in Python" in str(
        refused.value
    )


@needs_compiler
def test_library_without_the_handshake_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"_C\.so cannot be used \(it lacks a function.*ge_abi.*pip install"
    ):
        load_library(compile_library(tmp_path, "int ge_old(void) { return 0; }\n"))


@needs_compiler
def test_library_that_lacks_a_function_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lacks a function.*ge_isa"):
        load_library(library_that_says(tmp_path, facts()))


def test_structs_have_no_field_twice() -> None:
    for struct in abi._STRUCTS.values():
        names = [name for name, *_ in struct._fields_]
        assert len(set(names)) == len(names)
