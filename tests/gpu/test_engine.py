"""The whole engine on the Triton kernels, in Triton's interpreter: what it promises of labels, on a tiny model."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launches import counted

from guardengine import Engine, Label
from guardengine.core.layout import build_batch
from guardengine.core.scheduler import Chunk
from guardengine.core.state import StreamState

VOCAB = 512
LIMITS: dict[str, Any] = {"kv_cache_bytes": 2**21, "max_model_len": 512, "block_size": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(checkpoints: Any) -> Path:
    """One layer less than usual: programs are what the interpreter's time goes into."""
    path: Path = checkpoints(vocab_size=VOCAB, dtype="float32", num_hidden_layers=2)
    return path


@pytest.fixture(scope="module")
def module_engine(folder: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(folder, backend="triton", **LIMITS) as engine:
        yield engine


@pytest.fixture
def engine(module_engine: Engine) -> Iterator[Engine]:
    """Each test must leave it empty and whole."""
    yield module_engine
    for state in list(module_engine.core.states.values()):
        module_engine.core.close_stream(state)
    module_engine.check_integrity()


@pytest.fixture
def reference(folder: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(folder, backend="reference", **LIMITS) as engine:
        yield engine


def ids_of(count: int, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, VOCAB, count).tolist()
    return found


def fed(engine: Engine, ids: Sequence[int], pieces: Sequence[int]) -> list[Label]:
    """A stream's labels, fed piece by piece."""
    stream = engine.open(token_ids=ids[: pieces[0]], role="assistant")
    labels = engine.run()
    start = pieces[0]
    for piece in pieces[1:]:
        stream.append(ids[start : start + piece])
        labels += engine.run()
        start += piece
    assert start == len(ids)
    stream.close()
    return labels


def logits(labels: Sequence[Label]) -> np.ndarray:
    return np.stack([np.concatenate([label.risk_logits, label.category_logits]) for label in labels])


def near(actual: Sequence[Label], expected: Sequence[Label]) -> None:
    assert [(x.role, x.position, x.token_id) for x in actual] == [
        (x.role, x.position, x.token_id) for x in expected
    ]
    np.testing.assert_allclose(logits(actual), logits(expected), atol=1e-4)
    for a, e in zip(actual, expected, strict=True):
        assert a.risk_probs == pytest.approx(e.risk_probs, abs=1e-5)
        assert a.category_probs == pytest.approx(e.category_probs, abs=1e-5)
        assert (a.risk, a.category) == (e.risk, e.category)


def same_bits(actual: Sequence[Label], expected: Sequence[Label]) -> None:
    np.testing.assert_array_equal(logits(actual), logits(expected))
    assert [a.risk_probs for a in actual] == [e.risk_probs for e in expected]


def test_what_runs(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats["device"], stats["isa"]) == ("cpu", "interpreter")
    assert engine.core.runner.max_in_flight == 2


def test_labels_are_the_references(engine: Engine, reference: Engine) -> None:
    """A prompt that takes a large step, then small ones: one token, several, two streams."""
    ids = ids_of(80)
    near(fed(engine, ids, [70, 1, 4, 5]), fed(reference, ids, [70, 1, 4, 5]))


def test_past_a_segment_the_bits_stay(engine: Engine, reference: Engine) -> None:
    """More keys than one segment of attention: split over programs, and merged by whoever comes last."""
    ids = ids_of(262, seed=3)
    stream = engine.open(token_ids=ids[:255], role="user")
    engine.run()
    branch = stream.fork()
    stream.append(ids[255:])
    labels = engine.run()
    near(labels, fed(reference, ids, [262])[255:])
    again = []
    for start, end in ((255, 257), (257, 262)):
        branch.append(ids[start:end])
        again += engine.run()
    same_bits(again, labels)


def test_a_prompt_that_wants_one_label(engine: Engine, reference: Engine) -> None:
    """Role user: the last row only; and a chunk of a prompt that wants none."""

    def scenario(engine: Engine) -> list[Label]:
        stream = engine.open(token_ids=ids_of(70, seed=8), role="user")
        found = engine.run()
        stream.close()
        return found

    near(scenario(engine), scenario(reference))


def test_int8_cache(folder: Path, engine: Engine) -> None:
    """Rounded as the reference rounds; a step of it is the same bits alone and in company."""
    ids = ids_of(12, seed=10)
    found = []
    for backend in ("triton", "reference"):
        with Engine.from_pretrained(folder, backend=backend, kv_dtype="int8", **LIMITS) as other:
            found.append(fed(other, ids, [9, 1, 2]))
    near(*found)
    assert np.abs(logits(found[0]) - logits(fed(engine, ids, [12]))).max() > 1e-4


def test_launches_of_a_step(engine: Engine) -> None:
    """What a captured step launches: at most six kernels a layer and four beside, torch's among them."""
    runner = engine.core.runner
    state = StreamState("s", None, [])  # type: ignore[arg-type]
    state.token_ids.extend(ids_of(3))
    state.block_table = array("i", [0])
    batch = build_batch([Chunk(state, 0, 3)], 16)[0]
    runner.launch(batch).wait()
    graph = runner._steps._graphs[4]  # type: ignore[attr-defined]
    with torch.inference_mode():
        kernels, others = counted(graph.replay)
    assert kernels == 6 * runner.info.config.num_layers + 1
    views = {"aten::unbind", "aten::flatten"}
    assert [name for name in others if name not in views] == ["aten::index_select"]
