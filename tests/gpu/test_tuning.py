"""Choosing configurations: by rule, by measurement; what every choice must keep to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from launches import counted

from guardengine.kernels.gpu.linear_config import (
    GATED,
    NORMED,
    SHARED_BYTES,
    SUMMED,
    LinearConfig,
    candidates,
    default_config,
    num_columns,
)
from guardengine.kernels.gpu.tuning import tune
from guardengine.kernels.gpu.workspace import allocate_workspace

WEIGHTS = [  # of the 0.6B, 4B and 8B models
    (operator, shape)
    for hidden, attended, keys, mlp in (
        (1024, 2048, 1024, 3072),
        (2560, 4096, 1024, 9728),
        (4096, 4096, 1024, 12288),
    )
    for operator, shape in (
        (NORMED, (attended + 2 * keys, hidden)),
        (SUMMED, (hidden, attended)),
        (GATED, (2 * mlp, hidden)),
        (SUMMED, (hidden, mlp)),
    )
]
ODD = [(NORMED, (96, 100)), (GATED, (66, 33)), (SUMMED, (192, 48)), (SUMMED, (1, 1))]


@pytest.mark.parametrize("num_sms", [46, 84, 108, 132])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_candidate_fits_every_gpu(dtype: torch.dtype, num_sms: int) -> None:
    for operator, shape in (*WEIGHTS, *ODD):
        found = candidates(operator, shape, dtype=dtype, num_sms=num_sms)
        assert found[0] == default_config(operator, shape, dtype=dtype, num_sms=num_sms)
        assert len(found) == len(set(found)) <= 16
        for config in found:
            assert config.shared_bytes(operator, dtype.itemsize) <= SHARED_BYTES
            assert min(config.block_n, config.block_k) >= 16  # what tensor cores multiply
            for number in (config.block_n, config.block_k, config.split_k, config.num_warps):
                assert number & (number - 1) == 0


@pytest.mark.parametrize("num_sms", [84, 108, 132])
@pytest.mark.parametrize(("operator", "shape"), WEIGHTS)
def test_the_rule_fills_the_gpu(operator: str, shape: tuple[int, int], num_sms: int) -> None:
    config = default_config(operator, shape, dtype=torch.bfloat16, num_sms=num_sms)
    programs = -(-num_columns(operator, shape) // config.block_n) * config.split_k
    assert 0.9 * num_sms <= programs
    assert -(-shape[1] // config.block_k) >= 4 * config.split_k
    assert len(candidates(operator, shape, dtype=torch.bfloat16, num_sms=num_sms)) > 2


@pytest.mark.parametrize("max_rows", [1, 16, 17, 64])
def test_scratch_is_enough_for_fewer_rows(max_rows: int) -> None:
    for operator, shape in WEIGHTS:
        config = LinearConfig(32, 64, 64, 4, 4, 4)
        most = config.scratch(operator, num_columns(operator, shape), max_rows)
        for num_rows in range(1, max_rows + 1):
            some = config.scratch(operator, num_columns(operator, shape), num_rows)
            assert some[0] <= most[0]
            assert some[1] <= most[1]


@pytest.mark.parametrize("operator", [NORMED, GATED, SUMMED])
def test_tune_takes_the_fastest_over_all_numbers_of_rows(operator: str) -> None:
    shape = (64, 256)
    choices = candidates(operator, shape, dtype=torch.float32, num_sms=4)
    assert len(choices) > 2
    # The second is fastest for one row, the third over both.
    seconds = [9.0] * (2 * len(choices))
    seconds[2:6] = [1.0, 8.0, 2.0, 2.0]
    launches = []

    def measure(run: Callable[[], None]) -> float:
        if not launches:
            launches.append(counted(run))
        return seconds.pop(0)

    chosen = tune(
        operator, shape, torch.float32, (1, 20), measure, device="cpu", num_sms=4, cache_bytes=2**17
    )
    assert chosen == choices[2]
    assert seconds == []
    assert launches[0][0] == 3  # as many copies of 64 KiB as are more than 128 KiB


def test_tune_of_another_operator() -> None:
    with pytest.raises(ValueError, match="linear_add"):
        tune("linear", (16, 16), torch.float32, (1,), lambda run: 0.0, device="cpu", num_sms=1)


def test_a_workspace_is_as_large_as_the_largest_need() -> None:
    config, whole = LinearConfig(32, 16, 32, 4, 4, 3), LinearConfig(32, 64, 64, 1, 4, 3)
    configs = {(NORMED, (40, 96)): config, (GATED, (40, 96)): config, (SUMMED, (64, 64)): whole}
    allocated = allocate_workspace(configs, "cpu", max_rows=40, others=[(100, 7)])
    # 2 tiles of 32 rows x 2 blocks x 4 parts: 32 rows of 16 gates, 16 ups and a sum of squares
    assert allocated.partials.numel() == 2 * 2 * 4 * 32 * 33
    assert allocated.counters.numel() == 7
    assert not allocated.counters.any()
    assert allocated.config(SUMMED, torch.empty(64, 64)) == whole
