"""The machine's ceilings and the stamp of benchmark records."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time

import pytest

from guardengine.errors import ConfigError
from guardengine.measuring import machine
from guardengine.runners.cores import load_library, memory_bytes

SMALL = 2**20  # in the cache: the probes' books are tested here, not the machine


@pytest.fixture(scope="module")
def ceilings():
    return machine.probe_ceilings(1)


@pytest.mark.slow
def test_ceilings_are_positive_and_finite(ceilings):
    for value in (ceilings.read_bytes_per_s, ceilings.fp32_flops):
        assert 1e8 < value < 1e14
    for value in (ceilings.bf16_flops, ceilings.int8_ops):
        assert math.isfinite(value)
        assert value == 0 or value > 1e9


def test_ceilings_are_those_of_the_instructions_found(ceilings):
    assert (ceilings.bf16_flops > 0) == ("avx512_bf16" in ceilings.isa)
    isa = ceilings.isa.split()
    assert (ceilings.int8_ops > 0) == ("vnni" in ceilings.isa or ("avx2" in isa and "avx512f" not in isa))
    if "fma" in ceilings.isa.split():
        # one 256-bit multiply-add every other cycle of a 1 GHz core is far below any CPU that has them
        assert ceilings.fp32_flops > 8e9


def test_no_peak_is_impossible(ceilings):
    """A loop that was optimised away, or counted wrongly, shows as more than the hardware can do."""
    lanes = 16 if "avx512f" in ceilings.isa else 8
    assert ceilings.fp32_flops < 6.5e9 * 2 * 2 * lanes  # 6.5 GHz, two multiply-adds a cycle
    assert ceilings.bf16_flops < 6.5e9 * 2 * 2 * 32
    assert ceilings.int8_ops < 6.5e9 * 2 * 2 * 64
    assert ceilings.read_bytes_per_s < 2e11  # one thread


def test_read_median_is_not_above_the_best(ceilings):
    assert 0 < ceilings.read_bytes_per_s_median <= ceilings.read_bytes_per_s


def test_read_buffer_is_larger_than_the_cache(ceilings):
    assert (
        ceilings.read_buffer_bytes >= 2 * machine.last_level_cache_bytes()
        or ceilings.read_buffer_bytes > memory_bytes("MemAvailable") // 8
    )


def test_reading_takes_the_time_it_says():
    """The rate is bytes over time: wall time of the whole call bounds it from above."""
    start = time.perf_counter()
    found = machine.probe_ceilings(1, read_buffer_bytes=256 * 2**20)
    elapsed = time.perf_counter() - start
    assert 256 * 2**20 / found.read_bytes_per_s < elapsed


@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_any_number_of_threads(num_threads):
    found = machine.probe_ceilings(num_threads, read_buffer_bytes=SMALL)
    assert found.num_threads == num_threads
    assert found.read_bytes_per_s > 0
    assert found.fp32_flops > 0


@pytest.mark.parametrize("num_threads", [0, -1, 1025, 1.0, True, None])
def test_bad_num_threads_is_refused(num_threads):
    with pytest.raises(ConfigError, match="pass a whole number from 1 to 1024"):
        machine.probe_ceilings(num_threads)


def test_buffer_below_a_page_per_thread_is_refused():
    with pytest.raises(ConfigError, match=r"read_buffer_bytes=4096: 2 threads need 8192"):
        machine.probe_ceilings(2, read_buffer_bytes=4096)


def test_no_memory_is_an_error_with_a_mend():
    with pytest.raises(ConfigError, match="not enough memory"):
        machine.probe_ceilings(1, read_buffer_bytes=2**60)


def test_missing_library_names_file_and_mend(tmp_path):
    with pytest.raises(ConfigError, match=r"_C\.so is missing.*pip install"):
        load_library(tmp_path / "_C.so")


def test_library_that_is_none_names_file_and_mend(tmp_path):
    path = tmp_path / "_C.so"
    path.write_bytes(b"not a library")
    with pytest.raises(ConfigError, match=r"_C\.so cannot be used.*pip install"):
        load_library(path)


def test_stamp_is_json_and_complete():
    stamp = machine.machine_stamp()
    assert json.loads(json.dumps(stamp)) == stamp
    assert stamp["cpu"]
    assert stamp["cores"] >= 1
    assert stamp["memory_bytes"] > 2**28
    for package in ("python", "torch", "numpy", "guardengine"):
        assert stamp[package][0].isdigit()
    assert {"commit", "is_dirty", "platform"} <= stamp.keys()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_is_of_this_checkout_only(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    unknown = {"commit": None, "is_dirty": None}
    inside = tmp_path / "site-packages"
    inside.mkdir()
    git("init", "-q")
    assert machine._git_state(tmp_path) == unknown  # no commit yet
    git("commit", "-q", "--allow-empty", "-m", "first")
    found = machine._git_state(tmp_path)
    assert len(found["commit"]) == 40
    assert found["is_dirty"] is False
    (tmp_path / "new").write_text("x")
    assert machine._git_state(tmp_path)["is_dirty"] is True
    assert machine._git_state(inside) == unknown  # somebody else's repository
