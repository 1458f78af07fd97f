"""What tests of engines share: token ids, ways to feed them, and the labels' logits for comparison."""

from __future__ import annotations

import random

import numpy as np
import torch

from guardengine import Engine, Label

VOCAB = 512


def ids(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(count)]


def logits(labels: list[Label]) -> np.ndarray:
    found = np.stack([np.concatenate((label.risk_logits, label.category_logits)) for label in labels])
    assert np.isfinite(found).all()
    return found


def bits(labels: list[Label]) -> np.ndarray:
    """All logits of some labels, for comparison by value and sign: equal or not, nothing in between."""
    return logits(labels).view(np.int32)


def feed(engine: Engine, prompt: list[int], response: list[int], k: int) -> np.ndarray:
    """The bits of the labels, with k tokens appended at a time and a step after each."""
    with engine.open(token_ids=prompt) as stream:
        engine.run()
        for start in range(0, len(response), k):
            stream.append(response[start : start + k])
            engine.run()
        return bits(stream.labels)


def feed_at_once(engine: Engine, prompt: list[int], response: list[int]) -> np.ndarray:
    """The same with one prefill of everything."""
    with engine.open(token_ids=prompt) as stream:
        stream.append(response)
        engine.run()
        assert engine.stats()["steps"] == 1
        return bits(stream.labels)


def poison(engine: Engine) -> Engine:
    """NaN in every slot of the cache, or with int8 NaN scales and extreme integers."""
    cache = engine.core.runner.kv_cache
    with torch.inference_mode():  # that in which some runners make them
        if cache.scales is None:
            cache.values.fill_(float("nan"))
        else:
            cache.values.fill_(-128)
            cache.scales.fill_(float("nan"))
    return engine
