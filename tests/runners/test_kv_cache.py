"""The two layouts of the KV cache."""

from __future__ import annotations

import doctest

import pytest
import torch
from feeding import feed_at_once

from guardengine import Engine
from guardengine.runners import batch
from guardengine.runners.kv_cache import KVCache


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


LAYOUTS = {  # of 3 layers, 5 blocks of 4 tokens, 2 key heads of 8
    "layers first": KVCache(numbered(3, 2, 5, 4, 2, 8), numbered(3, 2, 5, 2, 4), block_axis=2),
    "blocks first": KVCache(numbered(5, 3, 2, 2, 4, 8), numbered(5, 3, 2, 2, 4), block_axis=0),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_block_is_copied_in_every_layer_and_no_other_changes(name: str) -> None:
    known = LAYOUTS[name]
    cache = KVCache(known.values.clone(), known.scales.clone(), known.block_axis)
    cache.copy_block(1, 3)
    for found, before in ((cache.values, known.values), (cache.scales, known.scales)):
        axis = cache.block_axis
        assert torch.equal(found.select(axis, 3), before.select(axis, 1))
        rest = torch.tensor([0, 1, 2, 4])
        assert torch.equal(found.index_select(axis, rest), before.index_select(axis, rest))


@pytest.mark.parametrize("name", LAYOUTS)
def test_sizes(name: str) -> None:
    cache = LAYOUTS[name]
    assert cache.block_size == 4
    assert cache.num_bytes == 4 * (3 * 2 * 5 * 4 * 2 * 8 + 3 * 2 * 5 * 2 * 4)


def test_a_layer_is_keys_then_values_then_their_scales() -> None:
    cache = LAYOUTS["layers first"]
    keys, values, key_scales, value_scales = cache.layer(1)
    assert torch.equal(keys, cache.values[1, 0])
    assert torch.equal(values, cache.values[1, 1])
    assert torch.equal(key_scales, cache.scales[1, 0])
    assert torch.equal(value_scales, cache.scales[1, 1])
    assert KVCache(cache.values, None, 2).layer(1)[2:] == (None, None)


@pytest.mark.parametrize(("backend", "axis"), [("reference", 2), ("cpu", 0)])
def test_runners_have_the_layout_that_they_say(backend: str, axis: int, tiny: object) -> None:
    """Steps write where the layout says: into the blocks of the stream, all layers of them, and nowhere else."""
    with Engine.from_pretrained(
        tiny, backend=backend, kv_cache_bytes=2**20, max_model_len=64, block_size=16
    ) as engine:
        cache = engine.core.runner.kv_cache
        assert cache.block_axis == axis
        assert cache.block_size == 16
        cache.values.fill_(float("nan"))
        feed_at_once(engine, [1, 2, 3], [4] * 17)
        blocks = cache.values.movedim(axis, 0).flatten(1)
        assert (~blocks.isnan()).any(1).sum() == 2  # 20 tokens


def test_the_worked_example_of_a_batch_runs() -> None:
    result = doctest.testmod(batch)
    assert result.attempted >= 5
    assert result.failed == 0
